"""Losses of policy and value model, one a token.

Shape suffixes: B = rows, R = response tokens.
"""

import torch
from torch import Tensor

from rlhf_core.objectives.kl import MAX_LOG_RATIO, kl_k3
from rlhf_core.objectives.masked import zero_masked


def ppo_policy_losses(
    logprobs_BR: Tensor,
    old_logprobs_BR: Tensor,
    advantages_BR: Tensor,
    mask_BR: Tensor,
    clip_eps: float,
    k3_cap: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate objective with its sign turned, losses_BR (Schulman et al. 2017, eq. 7).

    L = -min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A), ratio = exp(logprobs - old_logprobs).
    Statistics per token: `policy/approx_kl` (k3 of old against new, held below `k3_cap`), `policy/clip_fraction` (1
    where the ratio lies outside the band), `policy/ratio` (whose maximum tells).
    """
    log_ratio_BR = zero_masked(logprobs_BR - old_logprobs_BR, mask_BR).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio_BR = log_ratio_BR.exp()
    clipped_BR = ratio_BR.clamp(1.0 - clip_eps, 1.0 + clip_eps)
    losses_BR = -zero_masked(torch.minimum(ratio_BR * advantages_BR, clipped_BR * advantages_BR), mask_BR)
    with torch.no_grad():
        outside_BR = ((ratio_BR - 1.0).abs() > clip_eps).to(ratio_BR.dtype)
        stats = {
            # The old policy drew the tokens, so KL(old || new) is the divergence that they estimate.
            "policy/approx_kl": kl_k3(old_logprobs_BR, logprobs_BR, mask_BR, k3_cap),
            "policy/clip_fraction": zero_masked(outside_BR, mask_BR),
            "policy/ratio": zero_masked(ratio_BR, mask_BR),
        }
    return losses_BR, stats


def value_losses(
    values_BR: Tensor, old_values_BR: Tensor, returns_BR: Tensor, mask_BR: Tensor, value_clip_eps: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the squared error, the worse of the free and the clipped prediction, losses_BR.

    L = 1/2 max((V - G)^2, (V_old + clip(V - V_old, -eps, eps) - G)^2): a prediction that has run further than
    eps from the rollout's value gets no gradient for running on. The statistic `loss/value_clip_fraction` is 1 where
    the clipped error is the larger one; inside eps both are the same but for rounding, and it is 0.
    """
    old_BR = zero_masked(old_values_BR, mask_BR)
    target_BR = zero_masked(returns_BR, mask_BR)
    free_BR = zero_masked(values_BR, mask_BR)
    clipped_BR = old_BR + (free_BR - old_BR).clamp(-value_clip_eps, value_clip_eps)
    free_error_BR = (free_BR - target_BR).square()
    clipped_error_BR = (clipped_BR - target_BR).square()
    losses_BR = 0.5 * torch.maximum(free_error_BR, clipped_error_BR)
    outside_BR = (free_BR - old_BR).abs() > value_clip_eps
    held_BR = (outside_BR & (clipped_error_BR > free_error_BR)).to(losses_BR.dtype)
    return losses_BR, {"loss/value_clip_fraction": held_BR.detach()}


def entropy_losses(entropy_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """Minus the entropy of each counted token's distribution, losses_BR; with a coefficient it keeps exploration up."""
    return -zero_masked(entropy_BR, mask_BR)
