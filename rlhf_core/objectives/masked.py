"""Means, variances and whitening over the tokens a mask lets through.

Shape suffixes: B = rows, R = response tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor

ROUNDING_UNITS = 16

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
    """(mean, population variance) over the tokens with mask 1 of all processes that `across` sums over, in float64.

    A token weighs the same in a long row and a short one; the variance is divided by n, not n - 1. Two passes, since
    the mean square less the squared mean loses its digits where the mean is large; and in float64, since a mean that
    is rounded to float32 lies off equal values, by a different distance for each number of them.
    Raises ValueError when the masks are zero everywhere.
    """
    count = _checked(across(mask.double().sum()))
    wide = zero_masked(values, mask).double()
    mean = across(wide.sum()) / count
    return mean, across(zero_masked(wide - mean, mask).square().sum()) / count


def rounding_variance(mean: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    """The variance that rounding alone may give to equal numbers of this size and type: (16 units in the last place)^2.

    Sixteen, because what is compared is the end of a short computation: each of its steps rounds once.
    """
    return (ROUNDING_UNITS * torch.finfo(dtype).eps * mean) ** 2


def masked_whiten(values: Tensor, mask: Tensor, eps: float = 1e-8, across: SumOver = here) -> Tensor:
    """Shift and scale to mean 0 and variance 1 over the tokens with mask 1 of all processes; zeros elsewhere.

    `eps` and the variance of rounding stand beside the variance: tokens that are all alike, or alike but for their last
    digits, become (nearly) zeros, however large they are. For advantages; rewards whitened token by token would pay
    for a token's mere existence.
    """
    mean, variance = masked_moments(values, mask, across)
    scale = torch.rsqrt(variance + eps + rounding_variance(mean, values.dtype))
    return zero_masked(((zero_masked(values, mask).double() - mean) * scale).to(values.dtype), mask)


def _checked(count: Tensor) -> Tensor:
    if count == 0:
        raise ValueError("the mask is zero everywhere, so no mean exists; leave empty responses out of a batch")
    return count
