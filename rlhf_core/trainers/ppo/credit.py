"""Credit: from scores and divergences of a rollout to the advantage of every token.

Shape suffixes: B = rows of a part, R = response tokens, N = all responses of the rollout, K = those of them that count,
T = its response tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_core.config import PPOConfig
from rlhf_core.config.ppo import AdvantageMethod
from rlhf_core.objectives.advantages import gae, shape_rewards
from rlhf_core.objectives.baselines import (
    group_relative_advantages,
    leave_one_out_advantages,
    over_tokens,
    reinforce_advantages,
)
from rlhf_core.objectives.kl import kl_estimate
from rlhf_core.objectives.masked import masked_sum, masked_whiten, zero_masked
from rlhf_core.state.world import ALONE, World
from rlhf_core.trainers.ppo.parts import Rollout, RolloutPart
from rlhf_core.trainers.ppo.scores import earned_scores

KL_COEF = "kl_coef"


@dataclass(frozen=True, kw_only=True, slots=True)
class CreditedPart:
    """A part of a rollout with its credit.

    Attributes:
        advantages_BR: scaled as configured and weighed by importance.
        returns_BR: neither.
    """

    part: RolloutPart
    rewards_BR: Tensor
    advantages_BR: Tensor
    returns_BR: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Minibatch:
    """The responses of a gradient step.

    Attributes:
        parts: what this process computes of it.
        tokens: response tokens over all processes; figures are means over them.
        divisor: what losses are divided by: the mean of `tokens` over the rollout's minibatches, so that a token counts
            the same in whichever minibatch it is.
        fresh: written in this rollout; replayed responses teach the policy but not the value model, which is to
            know what the policy of now is worth.
    """

    parts: list[CreditedPart]
    tokens: int
    divisor: float
    fresh: bool


def assign_credit(
    cfg: PPOConfig, extra: dict[str, Any], rollout: Rollout, world: World = ALONE
) -> tuple[list[Minibatch], Tensor]:
    """Rewards, returns and advantages of every token.

    Args:
        cfg: of the whole trainer.
        extra: state of score normalisation and of the KL controller.
        rollout: with scores.
        world: advantages are scaled over the tokens of all processes.

    Returns:
        The minibatches, and how much each response has to teach: the mean |advantage| of its tokens, before scaling,
        surprise_N.
    """
    counts_N = torch.tensor([row not in rollout.aside for row in range(len(rollout.responses))])
    earned_N = earned_scores(cfg, extra, rollout.responses, rollout.counted_fresh).where(counts_N, 0.0)
    kl_coef = extra.get(KL_COEF, cfg.kl_coef)
    parts = rollout.parts()
    rewards = []
    for part in parts:
        mask_BR = part.batch.response_mask_BR
        kl_BR = kl_estimate(cfg.kl.estimator, part.old_logprobs_BR, part.ref_logprobs_BR, mask_BR, cfg.kl.k3_cap)
        rewards.append(shape_rewards(earned_N[part.rows].to(kl_BR.device), kl_BR, mask_BR, kl_coef))
    pairs = token_advantages(cfg, rollout, rewards, counts_N, world)
    surprise_N = rollout.gather(
        [mean_size(part, adv_BR) for part, (adv_BR, _) in zip(parts, pairs, strict=True)], world
    )
    scaled = [zero_masked(advantages_BR, part.mask_BR) for part, (advantages_BR, _) in zip(parts, pairs, strict=True)]
    if cfg.advantages.scaling == "whiten":
        scaled = whitened(scaled, [part.mask_BR for part in parts], world)
    divisor = sum(rollout.tokens) / sum(tokens > 0 for tokens in rollout.tokens)
    credited = iter(
        CreditedPart(
            part=part, rewards_BR=rewards_BR, advantages_BR=advantages_BR * part.weights_BR, returns_BR=returns_BR
        )
        for part, rewards_BR, advantages_BR, (_, returns_BR) in zip(parts, rewards, scaled, pairs, strict=True)
    )
    minibatches = [
        Minibatch(
            parts=[next(credited) for _ in own],
            tokens=tokens,
            divisor=divisor,
            fresh=own[0].rows[0] < rollout.num_fresh,
        )
        for own, tokens in zip(rollout.minibatches, rollout.tokens, strict=True)
    ]
    return minibatches, surprise_N


def token_advantages(
    cfg: PPOConfig, rollout: Rollout, rewards: Sequence[Tensor], counts_N: Tensor, world: World
) -> list[tuple[Tensor, Tensor]]:
    """(advantages_BR, returns_BR) of each part, before scaling."""
    parts = rollout.parts()
    masks = [part.batch.response_mask_BR for part in parts]
    if cfg.has_value_model:
        return [
            gae(rewards_BR, part.old_values_BR, mask_BR, cfg.gamma, cfg.gae_lambda, part.last_values_B)
            for part, rewards_BR, mask_BR in zip(parts, rewards, masks, strict=True)
        ]
    totals = [masked_sum(rewards_BR, mask_BR) for rewards_BR, mask_BR in zip(rewards, masks, strict=True)]
    advantages_N = response_advantages(cfg, rollout.gather(totals, world), counts_N)
    return [
        (over_tokens(advantages_N[part.rows].to(totals_B), mask_BR), over_tokens(totals_B, mask_BR))
        for part, totals_B, mask_BR in zip(parts, totals, masks, strict=True)
    ]


def response_advantages(cfg: PPOConfig, totals_N: Tensor, counts_N: Tensor) -> Tensor:
    """Advantage of each whole response that counts, from what those earned in total; 0 for others: advantages_N."""
    groups_K, totals_K = (torch.arange(len(totals_N)) // cfg.responses_per_prompt)[counts_N], totals_N[counts_N]
    advantages_K = RESPONSE_ADVANTAGES[cfg.advantages.method](totals_K, groups_K)
    return torch.zeros_like(totals_N).masked_scatter(counts_N, advantages_K)


def beyond_the_others(totals_K: Tensor, groups_K: Tensor) -> Tensor:
    """What a response earned beyond the mean of all others, to whichever prompt: advantages_K."""
    wide_K = totals_K.double()  # rounded to float32 the mean lies off equal totals
    others_K = (wide_K.sum() - wide_K) / (len(wide_K) - 1)
    return reinforce_advantages(wide_K, others_K).to(totals_K.dtype)


RESPONSE_ADVANTAGES: Mapping[AdvantageMethod, Callable[[Tensor, Tensor], Tensor]] = {
    "reinforce": beyond_the_others,
    "rloo": leave_one_out_advantages,
    "grpo": group_relative_advantages,
}
"""The methods without a value model: from what each response earned and which are to the same prompt, advantages_K."""


def whitened(values: Sequence[Tensor], masks: Sequence[Tensor], world: World) -> list[Tensor]:
    """Values with mean 0 and variance 1 over the counted tokens of all tensors and all processes; zeros elsewhere."""
    whitened_T = masked_whiten(flat(values), flat(masks), across=world.total)
    pieces = whitened_T.split([one.numel() for one in values])
    return [piece.view_as(one) for piece, one in zip(pieces, values, strict=True)]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All elements one after the other."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def mean_size(part: RolloutPart, advantages_BR: Tensor) -> Tensor:
    """Mean |advantage| of each response's tokens, size_B."""
    mask_BR = part.batch.response_mask_BR
    return masked_sum(advantages_BR.abs(), mask_BR) / mask_BR.sum(1)
