"""Advantages without a value model: one number a response, the same for all of its tokens.

Shape suffixes: B = rows (responses), R = response tokens. `totals_B` is what a response earned altogether: its score
less what it paid for divergence. `group_B` names each row's prompt by any integer; rows may stand in any order.
Groups must be whole: all responses to a prompt in one call, wherever they were sampled.
"""

import torch
from torch import Tensor

from rlhf_core.objectives.masked import rounding_variance, zero_masked

GROUP_STD_EPS = 1e-4
"""Stands beside a group's standard deviation, as in TRL's GRPO: responses that all earn the same give 0, not 0/0."""


def over_tokens(advantages_B: Tensor, mask_BR: Tensor) -> Tensor:
    """Give each counted token the advantage of its response; zeros elsewhere."""
    return zero_masked(advantages_B[:, None].expand(mask_BR.shape), mask_BR)


def reinforce_advantages(totals_B: Tensor, baseline: Tensor | float) -> Tensor:
    """What a response earned beyond a baseline that does not depend on it (Williams 1992): any such one is unbiased.

    The baseline may be a number, such as a running mean of earlier rollouts, or one a row.
    """
    return totals_B - baseline


def leave_one_out_advantages(totals_B: Tensor, group_B: Tensor) -> Tensor:
    """What a response earned beyond the mean of the others to its prompt (RLOO; Ahmadian et al. 2024, eq. 8).

    A_i = r_i - (sum of the other r_j) / (K - 1): its baseline leaves out the response, so it stays unbiased.
    Raises ValueError for a prompt with one response, which has no others.
    """
    size_B, mean_B = _group_size_and_mean(totals_B, group_B)
    # r - (K mean - r) / (K - 1) = (r - mean) K / (K - 1), in which a large common level cancels first
    return ((totals_B - mean_B) * size_B / (size_B - 1)).to(totals_B.dtype)


def group_relative_advantages(totals_B: Tensor, group_B: Tensor, eps: float = GROUP_STD_EPS) -> Tensor:
    """Standard score of a response among those to its prompt (GRPO; Shao et al. 2024, section 4.1.2).

    A_i = (r_i - mean) / (std + eps), the deviation taken with n - 1 as TRL does, with the variance of rounding beside
    its square: totals that are equal but for their last digits give (nearly) 0, however large they are. Dividing makes
    prompts on which responses hardly differ weigh as much as others (Liu et al. 2025); `leave_one_out_advantages`
    does not divide.
    Raises ValueError for a prompt with one response, whose deviation does not exist.
    """
    size_B, mean_B = _group_size_and_mean(totals_B, group_B)
    centred_B = totals_B - mean_B
    _, places_B = torch.unique(group_B, return_inverse=True)
    squares_G = centred_B.new_zeros(int(places_B.max()) + 1).index_add(0, places_B, centred_B.square())
    rounding_B = rounding_variance(mean_B, totals_B.dtype)
    return (centred_B / ((squares_G[places_B] / (size_B - 1) + rounding_B).sqrt() + eps)).to(totals_B.dtype)


def _group_size_and_mean(totals_B: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor]:
    """In float64: a mean rounded to float32 lies off equal totals, by a distance that whitening would make a signal."""
    names, places_B, sizes_G = torch.unique(group_B, return_inverse=True, return_counts=True)
    if bool((sizes_G < 2).any()):
        alone = names[sizes_G < 2].tolist()
        raise ValueError(f"prompts {alone[:5]} have one response each; comparing within a prompt needs two or more")
    wide_B = totals_B.double()
    sums_G = wide_B.new_zeros(len(names)).index_add(0, places_B, wide_B)
    size_B = sizes_G[places_B].to(wide_B.dtype)
    return size_B, sums_G[places_B] / size_B
