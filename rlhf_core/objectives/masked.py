"""Means, variances and whitening over the tokens a mask lets through.

Shape suffixes: B = rows, R = response tokens.
"""

import torch
from torch import Tensor


def zero_masked(values: Tensor, mask: Tensor) -> Tensor:
    """Return `values` with zeros under the mask's zeros.

    A selection and not a product: NaN or infinity in padding would survive a multiplication, and would come back
    through its gradient too.
    """
    return values.masked_fill(mask == 0, 0.0)


def masked_sum(values_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """Sum over response tokens, one number a row."""
    return zero_masked(values_BR, mask_BR).sum(dim=-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over every token with mask 1, all rows together: a token weighs the same in a long row and a short one.

    Raises ValueError when the mask is zero everywhere, because that mean does not exist.
    """
    return zero_masked(values, mask).sum() / _count(mask)


def masked_variance(values: Tensor, mask: Tensor) -> Tensor:
    """Population variance (divided by n, not n - 1) over the tokens with mask 1."""
    return masked_mean((zero_masked(values, mask) - masked_mean(values, mask)).square(), mask)


def masked_whiten(values: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """Shift and scale to mean 0 and variance 1 over the tokens with mask 1; zeros elsewhere.

    `eps` stands beside the variance, so tokens that are all alike become zeros and not 0/0.
    """
    centred = zero_masked(values, mask) - masked_mean(values, mask)
    return zero_masked(centred * torch.rsqrt(masked_variance(values, mask) + eps), mask)


def _count(mask: Tensor) -> Tensor:
    count = mask.sum()
    if count == 0:
        raise ValueError("the mask is zero everywhere, so no mean exists; leave empty responses out of a batch")
    return count
