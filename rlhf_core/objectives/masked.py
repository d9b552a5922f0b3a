"""Means, variances and whitening over the tokens a mask lets through.

Shape suffixes: B = rows, R = response tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor

SumOver = Callable[[Tensor], Tensor]
"""Sum of a tensor over all processes, such as `World.total`."""


def here(tensor: Tensor) -> Tensor:
    """The sum over the only process: the tensor itself, gradient included."""
    return tensor


def zero_masked(values: Tensor, mask: Tensor) -> Tensor:
    """Return `values` with zeros under the mask's zeros.

    A selection and not a product: NaN or infinity in padding would survive a multiplication, and would come back
    through its gradient too.
    """
    return values.masked_fill(mask == 0, 0.0)


def masked_sum(values_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """Sum over response tokens, one number a row."""
    return zero_masked(values_BR, mask_BR).sum(dim=-1)


def masked_moments(values: Tensor, mask: Tensor, across: SumOver = here) -> tuple[Tensor, Tensor]:
    """(mean, population variance) over the tokens with mask 1 of all processes that `across` sums over.

    A token weighs the same in a long row and a short one; the variance is divided by n, not n - 1. Two passes, since
    the mean square less the squared mean loses its digits where the mean is large.
    Raises ValueError when the masks are zero everywhere.
    """
    count = _checked(across(mask.sum()))
    mean = across(zero_masked(values, mask).sum()) / count
    centred = zero_masked(zero_masked(values, mask) - mean, mask)
    return mean, across(centred.square().sum()) / count


def masked_whiten(values: Tensor, mask: Tensor, eps: float = 1e-8, across: SumOver = here) -> Tensor:
    """Shift and scale to mean 0 and variance 1 over the tokens with mask 1 of all processes; zeros elsewhere.

    `eps` stands beside the variance, so tokens that are all alike become zeros and not 0/0. For advantages; rewards
    whitened token by token would pay for a token's mere existence.
    """
    mean, variance = masked_moments(values, mask, across)
    return zero_masked((zero_masked(values, mask) - mean) * torch.rsqrt(variance + eps), mask)


def _checked(count: Tensor) -> Tensor:
    if count == 0:
        raise ValueError("the mask is zero everywhere, so no mean exists; leave empty responses out of a batch")
    return count
