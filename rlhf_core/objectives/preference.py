"""Losses that learn a policy from pairs directly, one a pair: `PAIR_LOSSES` has them by name.

Shape suffixes: N = pairs, B = rows, R = response tokens.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_core.objectives.masked import zero_masked
from rlhf_core.objectives.unpaired import kto_losses


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


@dataclass(frozen=True, kw_only=True, slots=True)
class PairOptions:
    """What a pair loss may read beside log-probabilities; no loss reads all.

    Attributes:
        beta: scale of implicit rewards; IPO's tau, ORPO's lambda.
        label_smoothing: share of labels taken to be wrong (`conservative`, `robust`).
        target_margin: gamma of `simpo`.
        desirable_weight, undesirable_weight: of `kto`.
        baseline: KTO's reference point, `unpaired.kto_baseline`.
    """

    beta: float
    label_smoothing: float = 0.0
    target_margin: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    baseline: Tensor | float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PairLoss:
    """A loss on pairs.

    Attributes:
        reads: what it makes of the log-probabilities: a number of each chosen and of each rejected response, of which
            beta times are the implicit rewards.
        losses: of those, losses_N.
        needs_reference: False: log-probabilities under the reference may be zeros.
        needs_baseline: it reads `PairOptions.baseline`.
    """

    reads: Callable[[PairLogprobs], tuple[Tensor, Tensor]]
    losses: Callable[[Tensor, Tensor, PairOptions], Tensor]
    needs_reference: bool = True
    needs_baseline: bool = False


def pair_losses(kind: str, pairs: PairLogprobs, options: PairOptions) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each pair by `PAIR_LOSSES[kind]`, losses_N, with statistics_N.

    Statistics, detached: the implicit rewards `implicit_reward/chosen` and `implicit_reward/rejected`, their difference
    `implicit_reward/margin`, and `implicit_reward/accuracy` with ties counted as half.
    """
    loss = PAIR_LOSSES[kind]
    chosen_N, rejected_N = loss.reads(pairs)
    losses_N = loss.losses(chosen_N, rejected_N, options)
    return losses_N, implicit_rewards(options.beta * chosen_N.detach(), options.beta * rejected_N.detach())


def log_ratios(pairs: PairLogprobs) -> tuple[Tensor, Tensor]:
    """Log-probabilities of whole responses, policy less reference: what most losses read."""
    chosen_N = pairs.policy_chosen_N - pairs.reference_chosen_N
    return chosen_N, pairs.policy_rejected_N - pairs.reference_rejected_N


def mean_log_ratios(pairs: PairLogprobs) -> tuple[Tensor, Tensor]:
    """The same a token."""
    chosen_N, rejected_N = log_ratios(pairs)
    return chosen_N / pairs.chosen_tokens_N, rejected_N / pairs.rejected_tokens_N


def mean_logprobs(pairs: PairLogprobs) -> tuple[Tensor, Tensor]:
    """The policy's log-probability a token, without a reference."""
    return pairs.policy_chosen_N / pairs.chosen_tokens_N, pairs.policy_rejected_N / pairs.rejected_tokens_N


def rewards_gap(chosen_N: Tensor, rejected_N: Tensor, beta: float) -> Tensor:
    """DPO's margin is the difference of the two rewards, rounded as it is reported."""
    return beta * chosen_N - beta * rejected_N


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


def _kto_pair_losses(chosen_N: Tensor, rejected_N: Tensor, options: PairOptions) -> Tensor:
    """KTO knows no pairs: the mean of what a liked and a disliked response lose, each for itself."""
    count, log_ratio_B = len(chosen_N), torch.cat([chosen_N, rejected_N])
    losses_B, _ = kto_losses(
        log_ratio_B,
        torch.zeros_like(log_ratio_B),  # the reference is taken off already
        torch.arange(2 * count, device=chosen_N.device) < count,
        options.baseline,
        options.beta,
        options.desirable_weight,
        options.undesirable_weight,
    )
    liked_N, disliked_N = losses_B.split(count)
    return (liked_N + disliked_N) / 2


PAIR_LOSSES: Mapping[str, PairLoss] = {
    "sigmoid": PairLoss(reads=log_ratios, losses=lambda c, r, o: sigmoid_losses(rewards_gap(c, r, o.beta))),
    "ipo": PairLoss(reads=mean_log_ratios, losses=lambda c, r, o: ipo_losses(c - r, o.beta)),
    "ipo_sum": PairLoss(reads=log_ratios, losses=lambda c, r, o: ipo_losses(c - r, o.beta)),
    "conservative": PairLoss(
        reads=log_ratios, losses=lambda c, r, o: conservative_losses(rewards_gap(c, r, o.beta), o.label_smoothing)
    ),
    "robust": PairLoss(
        reads=log_ratios, losses=lambda c, r, o: robust_losses(rewards_gap(c, r, o.beta), o.label_smoothing)
    ),
    "hinge": PairLoss(reads=log_ratios, losses=lambda c, r, o: hinge_losses(rewards_gap(c, r, o.beta))),
    "kto": PairLoss(reads=log_ratios, losses=_kto_pair_losses, needs_baseline=True),
    "orpo": PairLoss(
        reads=mean_logprobs, losses=lambda c, r, o: o.beta * odds_ratio_losses(c, r), needs_reference=False
    ),
    "simpo": PairLoss(
        reads=mean_logprobs,
        losses=lambda c, r, o: simpo_losses(c, r, o.beta, o.target_margin),
        needs_reference=False,
    ),
}
"""`align.dpo.loss`: every loss by its name; c and r are what the loss `reads` of the chosen and the rejected."""
