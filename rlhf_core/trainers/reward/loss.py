"""What the labelled pairs of one step ask of its scores: the sum of lambda_i L_i over criteria.

Everything here sees the whole step, so every mean is over all its pairs, prompts or responses.
Shape suffixes: B = responses of a step, C = criteria, D = hidden size, N = pairs, G = rankings, K = places of one.
"""

import torch
from torch import Tensor

from rlhf_core.config.reward import RewardConfig, RewardLossConfig
from rlhf_core.data.batching.pair_table import PairTable, implied_ranking, rankings_apart
from rlhf_core.objectives.ranking import (
    all_pairs_weights,
    bradley_terry_losses,
    centering_losses,
    level_losses,
    margin_losses,
    plackett_luce_losses,
    score_margins,
    tie_losses,
)
from rlhf_core.objectives.uncertainty import contrastive_losses, distilled_pair_losses, gaussian_pair_losses

LEAST_WEIGHT = 1e-8  # total of a step in which no pair weighs anything


def group_loss(
    cfg: RewardConfig, scores_BC: Tensor, log_variances_BC: Tensor | None, table: PairTable
) -> tuple[Tensor, dict[str, Tensor]]:
    """Ranking loss over all criteria, plus `cfg.centering` times the centering loss.

    A criterion counts with its weight where a pair of the step has a label for it. `loss/ranking` is the sum, and
    where there are several criteria `loss/ranking.<name>` each of them; `reward/margin` and `reward/accuracy` are over
    all pairs with a preference.
    """
    ranking = centering = scores_BC.new_zeros(())
    figures: dict[str, Tensor] = {}
    for place, (name, weight) in enumerate(cfg.criteria.items()):
        pairs = table.rows(table.criterion_N == place)
        if not len(pairs):
            continue
        scores_B = scores_BC[:, place]
        variances_B = None if log_variances_BC is None else log_variances_BC[:, place].exp()
        part = ranking_loss(cfg.loss, scores_B, variances_B, pairs)
        ranking = ranking + weight * part
        centering = centering + centering_of(cfg.loss, scores_B, pairs)
        if len(cfg.criteria) > 1:
            figures[f"loss/ranking.{name}"] = part
    loss = ranking + cfg.centering * centering
    decided = table.rows(~table.tie_N)
    if len(decided):
        margins = score_margins(
            scores_BC[decided.chosen_N, decided.criterion_N], scores_BC[decided.rejected_N, decided.criterion_N]
        )
        figures |= {name: values_N.mean() for name, values_N in margins.items()}
    return loss, {"loss/ranking": ranking, **figures}


def ranking_loss(cfg: RewardLossConfig, scores_B: Tensor, variances_B: Tensor | None, pairs: PairTable) -> Tensor:
    """The loss of one criterion's pairs, a weighted mean over pairs or over prompts."""
    if cfg.name == "plackett_luce":
        return plackett_luce_loss(scores_B, pairs)
    losses_N = labelled_pair_losses(cfg, scores_B, variances_B, pairs)
    weights_N = pair_weights(cfg, scores_B, pairs)
    return (weights_N * losses_N).sum() / weights_N.sum().clamp_min(LEAST_WEIGHT)


def labelled_pair_losses(
    cfg: RewardLossConfig, scores_B: Tensor, variances_B: Tensor | None, pairs: PairTable
) -> Tensor:
    """The loss of each pair, losses_N.

    A tie is half a win of each side, in log-odds also beside `margin` and `hinge`, whose own losses would not move it;
    or it has the probability that the model of Rao and Kupper gives it, and decided pairs theirs.
    """
    chosen_N, rejected_N = scores_B[pairs.chosen_N], scores_B[pairs.rejected_N]
    margin_N = cfg.margin * pairs.margin_N if cfg.margin_from == "strength" else cfg.margin
    match cfg.name:
        case "thurstone" if variances_B is not None:
            variances = variances_B[pairs.chosen_N], variances_B[pairs.rejected_N]
            losses_N = gaussian_pair_losses(chosen_N, rejected_N, *variances)
            tied_N = 0.5 * (losses_N + gaussian_pair_losses(rejected_N, chosen_N, *reversed(variances)))
            return torch.where(pairs.tie_N, tied_N, losses_N)
        case "margin":
            losses_N, _ = bradley_terry_losses(chosen_N, rejected_N, margin_N)
        case "hinge":
            losses_N, _ = margin_losses(chosen_N, rejected_N, margin_N)
        case _:
            least = cfg.tie_threshold if cfg.ties == "rao_kupper" else 0.0
            losses_N, _ = bradley_terry_losses(chosen_N, rejected_N, least)
    if not pairs.tie_N.any():
        return losses_N
    if cfg.ties == "rao_kupper":
        return torch.where(pairs.tie_N, tie_losses(chosen_N, rejected_N, cfg.tie_threshold), losses_N)
    return torch.where(
        pairs.tie_N, distilled_pair_losses(chosen_N, rejected_N, torch.full_like(losses_N, 0.5)), losses_N
    )


@torch.no_grad()
def pair_weights(cfg: RewardLossConfig, scores_B: Tensor, pairs: PairTable) -> Tensor:
    """What each pair counts, weights_N. A tie has no strength and no wrong side: there it counts as much as any."""
    match cfg.weights:
        case "none":
            weights_N = torch.ones_like(pairs.margin_N)
        case "agreement":
            weights_N = pairs.agreement_N
        case "strength":
            weights_N = pairs.margin_N.masked_fill(pairs.tie_N, 1.0)
        case "difficulty":
            missed_N = torch.sigmoid(scores_B[pairs.rejected_N] - scores_B[pairs.chosen_N])
            weights_N = missed_N.masked_fill(pairs.tie_N, 0.5)
    return weights_N * all_pairs_weights(pairs.group_N) if cfg.average == "prompt" else weights_N


def plackett_luce_loss(scores_B: Tensor, pairs: PairTable) -> Tensor:
    """Mean over prompts of the mean over their rankings of the negative log-likelihood a choice, that is over K - 1.

    A ranking that its pairs do not imply (a circle, a tie, too few comparisons) counts as the mean of its pairs'
    Bradley-Terry losses, which is the same where K = 2. Pairs that come from no ranking are read as one of the prompt.
    """
    device = scores_B.device
    pairs = pairs.to("cpu")  # which pairs are a ranking is found step by step: on a GPU each would wait for the last
    apart, share_U = rankings_apart(pairs)
    rankings, rest = split_rankings(apart)
    total = scores_B.new_zeros(())
    if rankings:
        orders = list(rankings.values())
        places = max(map(len, orders))
        rows_GK = torch.tensor([order + [0] * (places - len(order)) for order in orders], device=device)
        sizes_G = torch.tensor([len(order) for order in orders], device=device)
        mask_GK = (torch.arange(places, device=device) < sizes_G[:, None]).float()
        losses_G = plackett_luce_losses(scores_B[rows_GK], mask_GK) / (sizes_G - 1)
        total = total + (share_U[list(rankings)].to(device) * losses_G).sum()
    if len(rest):
        weights_N = (share_U[rest.group_N] * all_pairs_weights(rest.group_N)).to(device)
        total = total + (weights_N * labelled_pair_losses(RewardLossConfig(), scores_B, None, rest.to(device))).sum()
    return total / len(pairs.group_N.unique())


def split_rankings(pairs: PairTable) -> tuple[dict[int, list[int]], PairTable]:
    """By group the ranking that its pairs imply, best response first, and the pairs of the groups that imply none."""
    rankings: dict[int, list[int]] = {}
    rest_N = torch.ones_like(pairs.tie_N)
    for group in pairs.group_N.unique().tolist():
        own_N = pairs.group_N == group
        own = pairs.rows(own_N)
        better_worse = list(zip(own.chosen_N.tolist(), own.rejected_N.tolist(), strict=True))
        ranking = None if own.tie_N.any() else implied_ranking(better_worse)
        if ranking:
            rankings[group] = ranking
            rest_N &= ~own_N
    return rankings, pairs.rows(rest_N)


def centering_of(cfg: RewardLossConfig, scores_B: Tensor, pairs: PairTable) -> Tensor:
    """Mean squared score, or mean squared sum of a pair's scores."""
    if cfg.center == "pairs":
        return centering_losses(scores_B[pairs.chosen_N], scores_B[pairs.rejected_N]).mean()
    return level_losses(scores_B).mean()


def contrastive_loss(states_BD: Tensor, table: PairTable, temperature: float) -> Tensor:
    """Contrast of the step's winners with its losers (InfoNCE on mean states).

    A winner has won more of its pairs than it lost, over all criteria. Its positive is the mean of the other winners'
    states, its negatives are all losers. A step with fewer than two winners or without a loser asks nothing.
    """
    decided = table.rows(~table.tie_N)
    balance_B = torch.zeros(len(states_BD), device=states_BD.device)
    balance_B.index_add_(0, decided.chosen_N, torch.ones_like(decided.margin_N))
    balance_B.index_add_(0, decided.rejected_N, -torch.ones_like(decided.margin_N))
    winners_ND, losers_MD = states_BD[balance_B > 0], states_BD[balance_B < 0]
    count = len(winners_ND)
    if count < 2 or not len(losers_MD):
        return states_BD.new_zeros(())
    others_ND = (winners_ND.sum(0) - winners_ND) / (count - 1)
    allowed_NM = torch.ones(count, len(losers_MD), device=states_BD.device)
    return contrastive_losses(winners_ND, others_ND, losers_MD, allowed_NM, temperature).mean()
