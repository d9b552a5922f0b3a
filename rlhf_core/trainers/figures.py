"""Figures of a step on their way from the device into the history, which is JSON and knows no NaN."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def reportable(figures: Mapping[str, float | None]) -> dict[str, float]:
    """Return the figures that are finite numbers, and under `optim/not_finite` how many were not.

    A figure that is missing stands out in a curve; one that was silently replaced would not.
    """
    finite = {key: value for key, value in figures.items() if value is not None and math.isfinite(value)}
    return finite | {"optim/not_finite": len(figures) - len(finite)}


def numbers(figures: Mapping[str, Tensor]) -> dict[str, float]:
    """Scalars as numbers, brought to the CPU together: each journey waits for all that the device was asked to do."""
    return dict(zip(figures, torch.stack([value.detach() for value in figures.values()]).tolist(), strict=True))
