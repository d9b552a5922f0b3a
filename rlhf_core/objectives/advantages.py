"""Generalised advantage estimation over response tokens.

Shape suffixes: B = rows, R = response tokens.
"""

import torch
from torch import Tensor

from rlhf_core.objectives.masked import SumOver, here, masked_moments, rounding_variance, zero_masked


def gae(
    rewards_BR: Tensor,
    values_BR: Tensor,
    mask_BR: Tensor,
    gamma: float,
    gae_lambda: float,
    last_values_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (advantages_BR, returns_BR), both zero where the mask is.

    Schulman et al. 2016, eq. 16, as the backward recursion A_t = delta_t + gamma * lambda * A_(t+1) with
    delta_t = r_t + gamma * V(s_(t+1)) - V(s_t); `values_BR` holds V at the position that predicts token t.
    `last_values_B` holds V of the state after each row's last token: 0 where a response ended by itself, and for one
    that the length limit cut either 0 too or a bootstrapped value; None: 0 for all. Masked tokens between two
    counted ones are stepped over, so the advantage of the later one flows into the earlier one.
    Returns are advantages plus values, before any whitening: the regression target of the value model.
    """
    advantages_BR = torch.zeros_like(rewards_BR)
    next_advantage_B = torch.zeros_like(rewards_BR[:, 0])
    next_value_B = torch.zeros_like(next_advantage_B) if last_values_B is None else last_values_B
    for t in reversed(range(rewards_BR.shape[1])):
        counts_B = mask_BR[:, t] != 0
        delta_B = rewards_BR[:, t] + gamma * next_value_B - values_BR[:, t]
        advantage_B = delta_B + gamma * gae_lambda * next_advantage_B
        next_advantage_B = torch.where(counts_B, advantage_B, next_advantage_B)
        next_value_B = torch.where(counts_B, values_BR[:, t], next_value_B)
        advantages_BR[:, t] = torch.where(counts_B, advantage_B, 0.0)
    return advantages_BR, zero_masked(advantages_BR + values_BR, mask_BR)


def shape_rewards(scores_B: Tensor, kl_BR: Tensor, mask_BR: Tensor, kl_coef: float) -> Tensor:
    """Per-token rewards: every token pays for its divergence, the last one also earns the score.

    r_t = -kl_coef * (log pi(a_t) - log pi_ref(a_t)) + [t is the row's last token] * score
    (Ziegler et al. 2019, eq. 2; Ouyang et al. 2022, eq. 2, token by token). `kl_BR` is the k1 estimate.
    Raises ValueError for a row without a token, which has no place for its score.
    """
    if bool((mask_BR.sum(dim=-1) == 0).any()):
        raise ValueError("a response without tokens cannot carry a score; leave it out of the rollout")
    columns = torch.arange(mask_BR.shape[1], device=mask_BR.device)
    last_B = (columns * (mask_BR != 0)).argmax(dim=-1)
    rewards_BR = zero_masked(-kl_coef * kl_BR, mask_BR)
    return rewards_BR.scatter_add(1, last_B.unsqueeze(1), scores_B.unsqueeze(1))


def penalise_scores(scores_B: Tensor, finished_B: Tensor, score_clip: float, missing_end_penalty: float) -> Tensor:
    """What PPO maximises: the score less a penalty where a response never ended, clipped to +- `score_clip`.

    The penalty is subtracted, not put in the score's place: an unfinished response that says the right thing stays
    above one that does not. It comes before the clipping, so no response falls below `-score_clip`.
    """
    penalty_B = missing_end_penalty * (~finished_B.bool()).to(scores_B.dtype)
    return (scores_B - penalty_B).clamp(-score_clip, score_clip)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, across: SumOver = here) -> Tensor:
    """1 - Var(return - value) / Var(return) over counted tokens: 1 is perfect, 0 no better than a constant.

    Over the tokens of all processes that `across` sums over. Returns that are all alike, or differ by what rounding
    does to numbers of their size, leave nothing to explain and give 0.
    """
    mean, total = masked_moments(returns, mask, across)
    _, left = masked_moments(returns.double() - values.double(), mask, across)
    told_apart = total > rounding_variance(mean, returns.dtype)
    return torch.where(told_apart, 1.0 - left / torch.where(told_apart, total, 1.0), 0.0).to(returns.dtype)
