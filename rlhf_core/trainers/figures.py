"""Figures of a step on their way into the history, which is JSON and knows no NaN."""

import math
from collections.abc import Mapping


def reportable(figures: Mapping[str, float | None]) -> dict[str, float]:
    """Return the figures that are finite numbers, and under `optim/not_finite` how many were not.

    A figure that is missing stands out in a curve; one that was silently replaced would not.
    """
    finite = {key: value for key, value in figures.items() if value is not None and math.isfinite(value)}
    return finite | {"optim/not_finite": len(figures) - len(finite)}
