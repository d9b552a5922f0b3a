"""Losses that learn a policy from pairs directly, one a pair.

Shape suffixes: N = pairs, B = rows, R = response tokens.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_core.objectives.masked import zero_masked

PairLoss = Literal["sigmoid", "conservative", "robust", "ipo", "ipo_sum", "hinge", "orpo", "simpo"]
REFERENCE_FREE: tuple[PairLoss, ...] = ("orpo", "simpo")
"""Losses that ask no reference: its log-probabilities may be zeros."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairLogprobs:
    """Summed response log-probabilities of N pairs, and how many tokens each sum has.

    The sums are over the same tokens under both models. Each tensor is [N].
    """

    policy_chosen_N: Tensor
    policy_rejected_N: Tensor
    reference_chosen_N: Tensor
    reference_rejected_N: Tensor
    chosen_tokens_N: Tensor
    rejected_tokens_N: Tensor


def pair_losses(
    kind: PairLoss, pairs: PairLogprobs, beta: float, *, label_smoothing: float = 0.0, target_margin: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """The chosen loss of each pair, losses_N, with statistics_N.

    `beta` scales implicit rewards (for `ipo` it is that paper's tau, for `orpo` its lambda); `label_smoothing`, the
    share of labels taken to be wrong, is read by `conservative` and `robust`; `target_margin` (gamma) by `simpo`.
    Statistics, detached: the implicit rewards `implicit_reward/chosen` and `implicit_reward/rejected`, their difference
    `implicit_reward/margin`, and `implicit_reward/accuracy` with ties counted as half.

    `ipo`, `orpo` and `simpo` read means over tokens, the others sums. `orpo` is the odds-ratio term alone; its paper
    adds the likelihood of the chosen response with weight 1 (`nll_losses`).
    """
    chosen_N = pairs.policy_chosen_N - pairs.reference_chosen_N
    rejected_N = pairs.policy_rejected_N - pairs.reference_rejected_N
    # DPO's margin is the difference of the two rewards, rounded as it is reported.
    match kind:
        case "sigmoid":
            losses_N = sigmoid_losses(beta * chosen_N - beta * rejected_N)
        case "conservative":
            losses_N = conservative_losses(beta * chosen_N - beta * rejected_N, label_smoothing)
        case "robust":
            losses_N = robust_losses(beta * chosen_N - beta * rejected_N, label_smoothing)
        case "ipo":
            chosen_N, rejected_N = chosen_N / pairs.chosen_tokens_N, rejected_N / pairs.rejected_tokens_N
            losses_N = ipo_losses(chosen_N - rejected_N, beta)
        case "ipo_sum":
            losses_N = ipo_losses(chosen_N - rejected_N, beta)
        case "hinge":
            losses_N = hinge_losses(beta * chosen_N - beta * rejected_N)
        case "orpo":
            chosen_N = pairs.policy_chosen_N / pairs.chosen_tokens_N
            rejected_N = pairs.policy_rejected_N / pairs.rejected_tokens_N
            losses_N = beta * odds_ratio_losses(chosen_N, rejected_N)
        case "simpo":
            chosen_N = pairs.policy_chosen_N / pairs.chosen_tokens_N
            rejected_N = pairs.policy_rejected_N / pairs.rejected_tokens_N
            losses_N = simpo_losses(chosen_N, rejected_N, beta, target_margin)
    return losses_N, implicit_rewards(beta * chosen_N.detach(), beta * rejected_N.detach())


def implicit_rewards(chosen_N: Tensor, rejected_N: Tensor) -> dict[str, Tensor]:
    """Statistics of each pair: the two rewards, their difference, and 1, 1/2 or 0 for right, tied, wrong."""
    margin_N = chosen_N - rejected_N
    return {
        "implicit_reward/chosen": chosen_N,
        "implicit_reward/rejected": rejected_N,
        "implicit_reward/margin": margin_N,
        "implicit_reward/accuracy": 0.5 * (margin_N.sign() + 1.0),
    }


def sigmoid_losses(margin_N: Tensor) -> Tensor:
    """DPO (Rafailov et al. 2023, eq. 7): -log sigmoid(margin), margin = beta * difference of the log-ratios.

    A policy equal to its reference has margin 0 and pays ln 2. It is `logsigmoid` and not log(sigmoid): the latter
    is -inf from a margin of about -104 on, in float32.
    """
    return -F.logsigmoid(margin_N)


def conservative_losses(margin_N: Tensor, label_smoothing: float) -> Tensor:
    """cDPO (Mitchell 2023): cross-entropy with a target of 1 - eps; lowest where sigmoid(margin) = 1 - eps."""
    return -(1.0 - label_smoothing) * F.logsigmoid(margin_N) - label_smoothing * F.logsigmoid(-margin_N)


def robust_losses(margin_N: Tensor, label_smoothing: float) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024, eq. 10): unbiased for the clean loss where a share eps of labels is flipped.

    [(1 - eps) * l(margin) - eps * l(-margin)] / (1 - 2 eps); it may be negative.
    Raises ValueError for eps of 1/2 or more, where labels say nothing.
    """
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; the robust loss needs 0 <= label_smoothing < 0.5")
    clean_N = -(1.0 - label_smoothing) * F.logsigmoid(margin_N) + label_smoothing * F.logsigmoid(-margin_N)
    return clean_N / (1.0 - 2.0 * label_smoothing)


def ipo_losses(log_ratio_gap_N: Tensor, beta: float) -> Tensor:
    """IPO (Azar et al. 2024, eq. 17): (gap - 1 / (2 beta))^2, which does not push a sure pair apart for ever.

    The gap is the difference of the log-ratios: summed over tokens as the paper writes it, or averaged as its authors
    ran it (so they told TRL), where long responses do not dominate the square.
    """
    return (log_ratio_gap_N - 1.0 / (2.0 * beta)).square()


def hinge_losses(margin_N: Tensor) -> Tensor:
    """max(0, 1 - margin), SLiC's loss on DPO's margin (Zhao et al. 2023; Liu et al. 2024, RSO, eq. 10)."""
    return (1.0 - margin_N).relu()


def odds_ratio_losses(chosen_mean_N: Tensor, rejected_mean_N: Tensor) -> Tensor:
    """ORPO's ranking term (Hong et al. 2024, eq. 7): -log sigmoid(log odds(chosen) - log odds(rejected)).

    odds = p / (1 - p) with p = exp(mean log-probability of a token). Raises no error for p = 1, whose odds are
    infinite: log(1 - p) is held at the smallest step below 1 that the number format knows.
    """
    difference_N = chosen_mean_N - rejected_mean_N
    return -F.logsigmoid(difference_N - (_log1m_exp(chosen_mean_N) - _log1m_exp(rejected_mean_N)))


def simpo_losses(chosen_mean_N: Tensor, rejected_mean_N: Tensor, beta: float, target_margin: float) -> Tensor:
    """SimPO (Meng et al. 2024, eq. 6): -log sigmoid(beta * (mean log-prob chosen - rejected) - gamma)."""
    return -F.logsigmoid(beta * (chosen_mean_N - rejected_mean_N) - target_margin)


def nll_losses(logprobs_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """Negative log-likelihood of each counted token, losses_BR: supervised fine-tuning, or a term beside a pair loss.

    Divided by all counted tokens it is the mean of Ouyang et al. 2022; beside DPO it keeps the chosen response itself
    likely and well formed (Pang et al. 2024, eq. 2), where DPO only asks for a difference.
    """
    return -zero_masked(logprobs_BR, mask_BR)


def _log1m_exp(x_N: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0 without cancellation (Maechler 2012): two forms, each exact on its side of -ln 2."""
    x_N = x_N.clamp_max(-torch.finfo(x_N.dtype).eps)
    return torch.where(x_N > -math.log(2.0), (-x_N.expm1()).log(), (-x_N.exp()).log1p())
