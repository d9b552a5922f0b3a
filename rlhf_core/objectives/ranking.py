"""Losses that learn a score from comparisons, one a pair or one a ranking.

Differences of scores are taken in float32 or wider. Shape suffixes: B = scored responses, N = pairs, G = rankings,
K = places of a ranking.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry_losses(
    chosen_scores_N: Tensor, rejected_scores_N: Tensor, margin_N: Tensor | float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of each choice, losses_N (Bradley & Terry 1952; Ouyang et al. 2022, eq. 1).

    -log sigmoid(s_chosen - s_rejected - margin); a margin asks more of pairs that people were sure of (Touvron et al.
    2023, eq. 2). Statistics: those of `score_margins`, which do not see the margin.
    """
    delta_N = _difference(chosen_scores_N, rejected_scores_N)
    return -F.logsigmoid(delta_N - margin_N), score_margins(chosen_scores_N, rejected_scores_N)


def margin_losses(
    chosen_scores_N: Tensor, rejected_scores_N: Tensor, margin_N: Tensor | float
) -> tuple[Tensor, dict[str, Tensor]]:
    """max(0, margin - (s_chosen - s_rejected)), losses_N: pairs that are far enough apart ask nothing more."""
    delta_N = _difference(chosen_scores_N, rejected_scores_N)
    return (margin_N - delta_N).relu(), score_margins(chosen_scores_N, rejected_scores_N)


def tie_losses(first_scores_N: Tensor, second_scores_N: Tensor, threshold: float) -> Tensor:
    """Negative log-likelihood that people saw no difference, losses_N (Rao & Kupper 1967).

    The model has one threshold eta > 0 for the smallest difference that people see:
    P(first) = sigmoid(delta - eta), P(second) = sigmoid(-delta - eta), P(tie) = 1 - both
    = (1 - exp(-2 eta)) sigmoid(eta - delta) sigmoid(eta + delta), a form in which nothing overflows or cancels for any
    eta. Decided pairs are then `bradley_terry_losses` with margin eta, so the three probabilities sum to 1 and ties
    and choices train one likelihood.
    Raises ValueError for a threshold that is not positive, under which ties cannot happen.
    """
    if not threshold > 0:
        raise ValueError(f"tie threshold is {threshold}; ties have no probability unless it is positive")
    delta_N = _difference(first_scores_N, second_scores_N)
    level = math.log(-math.expm1(-2.0 * threshold))
    return -(level + F.logsigmoid(threshold - delta_N) + F.logsigmoid(threshold + delta_N))


def score_margins(chosen_scores_N: Tensor, rejected_scores_N: Tensor) -> dict[str, Tensor]:
    """Statistics of each pair, detached: `reward/margin`, and `reward/accuracy`, where a tie of scores counts half."""
    delta_N = _difference(chosen_scores_N.detach(), rejected_scores_N.detach())
    return {"reward/margin": delta_N, "reward/accuracy": 0.5 * (delta_N.sign() + 1.0)}


def all_pairs_weights(group_N: Tensor) -> Tensor:
    """1 / C(K, 2) for each of the C(K, 2) pairs of a ranking, weights_N: a long ranking weighs like a short one.

    `group_N` names each pair's ranking by any integer. Summed and divided by the number of rankings it is the
    average of Ouyang et al. 2022, eq. 1; pairs left out (ties) do not count into C(K, 2).
    """
    _, places_N, counts_G = torch.unique(group_N, return_inverse=True, return_counts=True)
    return 1.0 / counts_G[places_N].float()


def plackett_luce_losses(scores_GK: Tensor, mask_GK: Tensor) -> Tensor:
    """Negative log-likelihood of each full ranking, losses_G (Plackett 1975; Luce 1959).

    `scores_GK` stand from the best response to the worst; rankings of fewer than K have mask 0 at their end.
    -sum_k [s_k - log sum_{j >= k} exp(s_j)]: the best is chosen among all, the next among the rest, and so on. With
    two places it is the Bradley-Terry loss.
    """
    wide_GK = scores_GK.to(torch.promote_types(scores_GK.dtype, torch.float32))
    present_GK = mask_GK != 0
    wide_GK = wide_GK.masked_fill(~present_GK, 0.0)
    places = scores_GK.shape[-1]
    later_KK = torch.ones(places, places, dtype=torch.bool, device=scores_GK.device).triu()
    rest_GKK = (later_KK & present_GK[:, None, :]) | torch.eye(places, dtype=torch.bool, device=scores_GK.device)
    lse_GK = wide_GK[:, None, :].expand(-1, places, -1).masked_fill(~rest_GKK, -math.inf).logsumexp(-1)
    return (lse_GK - wide_GK).masked_fill(~present_GK, 0.0).sum(-1)


def level_losses(scores_B: Tensor) -> Tensor:
    """Squared score of each response, losses_B: comparisons leave the level of the scores free, this ties each to 0.

    It also shrinks differences a little: a pair at +-d pays 2 d^2, where `centering_losses` lets it be.
    """
    return scores_B.square()


def centering_losses(chosen_scores_N: Tensor, rejected_scores_N: Tensor) -> Tensor:
    """(s_chosen + s_rejected)^2, losses_N (Eisenstein et al. 2023, section 2.1; TRL's `center_rewards_coefficient`).

    It ties the middle of each pair to 0 and leaves the difference free, which is all that comparisons speak of.
    """
    return (chosen_scores_N + rejected_scores_N).square()


def _difference(first_N: Tensor, second_N: Tensor) -> Tensor:
    wide = torch.promote_types(first_N.dtype, torch.float32)
    return first_N.to(wide) - second_N.to(wide)
