"""Learning again from what an older policy sampled: importance weights, and priorities of what to take.

Shape suffixes: B = rows, R = response tokens, M = rows in store.
"""

import torch
from torch import Tensor

from rlhf_core.objectives.kl import MAX_LOG_RATIO
from rlhf_core.objectives.masked import zero_masked

ROUNDING = 1e-12
"""A chance that lies no further below 1 is 1."""


def token_importance_weights(logprobs_BR: Tensor, behaviour_logprobs_BR: Tensor, mask_BR: Tensor, cap: float) -> Tensor:
    """min(pi(token) / behaviour(token), cap), without gradient; zero under the mask.

    Truncating bounds the variance for a little bias (Ionides 2008). Multiplied with a token's loss, it stands for
    the tokens that the present policy would have drawn; on fresh samples every weight is exactly 1.
    """
    log_ratio_BR = zero_masked(logprobs_BR.detach() - behaviour_logprobs_BR, mask_BR)
    return zero_masked(log_ratio_BR.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp_max(cap), mask_BR)


def priority_probabilities(priorities_M: Tensor, exponent: float) -> Tensor:
    """priority^exponent / sum, the chance of each stored row (Schaul et al. 2016, eq. 1); exponent 0 is uniform.

    Raises ValueError for a priority that is not positive: its row could never be drawn, nor its weight be computed; and
    for one that is not finite, beside which no other could.
    """
    if not bool(((priorities_M > 0) & priorities_M.isfinite()).all()):
        least, most = priorities_M.min().item(), priorities_M.max().item()
        raise ValueError(f"priorities must be positive and finite, they lie between {least} and {most}")
    # softmax of the logarithms is the same quotient and cannot overflow
    return torch.softmax(exponent * priorities_M.log(), dim=0)


def inclusion_probabilities(probabilities_M: Tensor, count: int) -> Tensor:
    """The chance of each row to be among `count` that are drawn without replacement, inclusion_M; they sum to `count`.

    In proportion to `probabilities_M`; a row whose share would pass 1 is drawn for sure, and the others share what is
    left (Särndal, Swensson and Wretman 1992, section 3.6). Probabilities so small that they are 0 share it evenly.
    Raises ValueError for more rows than there are.
    """
    if count > len(probabilities_M):
        raise ValueError(f"{count} rows cannot be drawn without replacement from {len(probabilities_M)}")
    sure_M = torch.zeros_like(probabilities_M, dtype=torch.bool)
    while True:
        left = count - int(sure_M.sum())
        shares_M = probabilities_M.masked_fill(sure_M, 0.0)
        if shares_M.sum() < torch.finfo(shares_M.dtype).tiny:
            shares_M = (~sure_M).to(shares_M.dtype)
        inclusion_M = left * shares_M / shares_M.sum().clamp_min(torch.finfo(shares_M.dtype).tiny)
        over_M = inclusion_M >= 1.0 - ROUNDING
        if not over_M.any():
            return inclusion_M.masked_fill(sure_M, 1.0)
        sure_M |= over_M


def draw_systematically(inclusion_M: Tensor, generator: torch.Generator) -> Tensor:
    """Places of rows, each drawn with exactly its chance and none twice: as many as the chances sum to.

    Rows are laid end to end in a random order, each as long as its chance, and every place a whole number apart from
    one random start is taken (Madow 1949). Drawing one row after the other in proportion to what is left, as
    `torch.multinomial` does, gives rows other chances of taking part, which have no formula.
    """
    sure_M, open_M = (inclusion_M >= 1.0).nonzero()[:, 0], (inclusion_M < 1.0).nonzero()[:, 0]
    order_M = open_M[torch.randperm(len(open_M), generator=generator)]
    start = torch.rand((), dtype=torch.float64, generator=generator)
    ends_M = inclusion_M.double()[order_M].cumsum(0)
    count = round(ends_M[-1].item()) if len(order_M) else 0
    if not count:
        return sure_M
    # the chances sum to a whole number but for rounding: stretched to it, each mark falls on a row
    places_B = torch.searchsorted(ends_M * (count / ends_M[-1]), start + torch.arange(count), right=True)
    return torch.cat([sure_M, order_M[places_B.clamp_max(len(order_M) - 1)]])


def priority_weights(inclusion_B: Tensor, count: int, num_stored: int, exponent: float) -> Tensor:
    """(count / (num_stored * inclusion))^exponent over its largest in the batch, weights_B <= 1.

    Schaul et al. 2016, section 3.4, with the chance of taking part in the place of count * P, which is the same where
    rows are drawn with replacement. Exponent 1 undoes in full that likely rows are drawn more often (Horvitz and
    Thompson 1952); 0 leaves it. Where all rows are drawn every weight is 1.
    """
    weights_B = (num_stored * inclusion_B / count) ** -exponent
    return weights_B / weights_B.max()
