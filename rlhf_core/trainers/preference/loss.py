"""The loss of one forward pass over preference pairs: which log-probabilities each loss reads, and what it divides by.

The losses themselves are pure, in `objectives`. Shape suffixes: B = responses, N = pairs, R = response tokens,
K = figures.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_core.config import DPOConfig
from rlhf_core.data.batching.pairs import PreferenceGroup, collate_groups
from rlhf_core.errors import DataError
from rlhf_core.objectives.masked import masked_sum
from rlhf_core.objectives.preference import PairLogprobs, PairOptions, nll_losses, pair_losses
from rlhf_core.rollout.logprobs import response_logprobs

FIGURES = (
    "loss/train",
    "loss/preference",
    "loss/chosen_nll",
    "implicit_reward/chosen",
    "implicit_reward/rejected",
    "implicit_reward/margin",
    "implicit_reward/accuracy",
)
"""What `pair_loss` reports: the whole loss, its preference part, its likelihood part, and the implicit rewards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTotals:
    """What a step divides by and compares with, over all its forward passes and processes.

    Attributes:
        pairs: how many there are.
        weight: sum of their weights.
        chosen_tokens: tokens of the chosen responses, each times its pair's weight.
        baseline: KTO's reference point; no other loss reads it.
    """

    pairs: int
    weight: float
    chosen_tokens: float
    baseline: Tensor


def step_totals(cfg: DPOConfig, groups: Sequence[PreferenceGroup], baseline: Tensor) -> StepTotals:
    """Totals over the groups of a step, with KTO's baseline.

    Raises:
        DataError: every pair weighs 0.
    """
    weights = preference_weights(cfg, groups)
    if not sum(weights):
        raise DataError(
            f"align.dpo.pair_weights {cfg.pair_weights}: all pairs of a step weigh 0. "
            "Fix: preference_weights: none, or raise preferences.min_margin above 0"
        )
    lengths = [len(group.responses[chosen]) for group in groups for chosen, _ in group.pairs]
    return StepTotals(
        pairs=len(weights),
        weight=sum(weights),
        chosen_tokens=sum(weight * length for weight, length in zip(weights, lengths, strict=True)),
        baseline=baseline,
    )


def preference_weights(cfg: DPOConfig, groups: Sequence[PreferenceGroup]) -> list[float]:
    """What each pair of the groups counts."""
    labels = [label for group in groups for label in group.labels]
    match cfg.pair_weights:
        case "none":
            return [1.0] * len(labels)
        case "agreement":
            return [label.agreement for label in labels]
        case "strength":
            return [label.margin for label in labels]


def pair_loss(
    cfg: DPOConfig,
    policy: PreTrainedModel,
    groups: Sequence[PreferenceGroup],
    reference_B: Tensor,
    totals: StepTotals,
    pad_id: int,
) -> tuple[Tensor, Tensor]:
    """These groups' part of the step's loss, and of its figures, [K], detached: the parts of a step add up.

    The loss is that of `cfg.loss`, a mean over pairs, plus `cfg.nll_coef` times the chosen responses' negative
    log-likelihood, a mean over tokens. Both weigh a response by the pairs it stands in, and by their weights.

    Args:
        cfg: which loss.
        policy: is learning.
        groups: share this forward pass.
        reference_B: summed log-probabilities of all their responses under the reference, on any device.
        totals: of the whole step.
        pad_id: fills rows of unequal length.
    """
    batch, chosen_N, rejected_N = collate_groups(groups, pad_id)
    batch, device = batch.to(policy.device), policy.device
    chosen_N, rejected_N, reference_B = chosen_N.to(device), rejected_N.to(device), reference_B.to(device)
    weights_N = torch.tensor(preference_weights(cfg, groups), device=device)
    logprobs_BR, mask_BR = response_logprobs(policy, batch), batch.response_mask_BR
    policy_B, tokens_B = masked_sum(logprobs_BR, mask_BR), mask_BR.sum(-1)
    pairs = PairLogprobs(
        policy_chosen_N=policy_B[chosen_N],
        policy_rejected_N=policy_B[rejected_N],
        reference_chosen_N=reference_B[chosen_N],
        reference_rejected_N=reference_B[rejected_N],
        chosen_tokens_N=tokens_B[chosen_N],
        rejected_tokens_N=tokens_B[rejected_N],
    )
    options = PairOptions(
        beta=cfg.beta,
        label_smoothing=cfg.label_smoothing,
        target_margin=cfg.simpo_margin,
        desirable_weight=cfg.desirable_weight,
        undesirable_weight=cfg.undesirable_weight,
        baseline=totals.baseline,
    )
    losses_N, stats = pair_losses(cfg.loss, pairs, options)
    preference = (weights_N * losses_N).sum() / totals.weight
    nll = (weights_N[:, None] * nll_losses(logprobs_BR, mask_BR)[chosen_N]).sum() / totals.chosen_tokens
    loss = preference + cfg.nll_coef * nll
    means = [stats[name].sum() / totals.pairs for name in FIGURES[3:]]
    return loss, torch.stack([loss, preference, nll, *means]).detach()
