"""Intervals of figures that are no mean: leave each group out in turn, on a scale where the figure is near normal.

The standard error is the delete-a-group jackknife's; the scale Fisher's z (arctanh) for figures that end at 1 and -1 or
below 1 (correlations, kappa, alpha), and the logarithm for means over tokens; the quantile Student's t with one degree
of freedom less than groups. A percentile bootstrap over few groups is too narrow by half: at five prompts it holds the
truth in 8 of 10 cases where this one does in 9.5.
"""

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from rlhf_core.evaluation.intervals import (
    MIN_GROUPS,
    MOST_NATS,
    Interval,
    group_index,
    normal_quantile,
    student_quantile,
)

MAX_BLOCKS = 200
"""Groups beyond so many are left out several at a time: t is then as good as normal, and the time stays bounded."""


def blocks_of(groups: Sequence[Hashable], most: int = MAX_BLOCKS) -> np.ndarray:
    """Return each row's block, counted from 0: its group, or the share of the groups that is left out with it."""
    return group_index(groups) % most


def leave_out(blocks: np.ndarray, statistic: Callable[[np.ndarray], float | None]) -> list[float | None]:
    """Return the statistic without each block in turn; it gets the rows that stay, as an index, in their order."""
    return [statistic(np.flatnonzero(blocks != block)) for block in range(int(blocks.max()) + 1)] if len(blocks) else []


def fisher_interval(
    estimate: float,
    without: Sequence[float | None],
    confidence: float,
    *,
    step: float,
    known_error: float | None = None,
    freedom: int | None = None,
) -> Interval | None:
    """Return the interval of a figure whose largest value is 1.

    Args:
        estimate: of all rows.
        without: the same without each block (`leave_out`).
        step: how far below 1 the figure's next possible value lies; where z would be infinite, that one stands in.
        known_error: standard error of z by theory, where there is one: the normal quantile then holds, and the
            jackknife can only widen.
        freedom: degrees of freedom of t; one less than blocks unless given.

    Returns:
        None with fewer than `MIN_GROUPS` blocks, or where the figure is undefined without one of them.
    """
    values = [value for value in without if value is not None]
    count = len(without)
    if count < MIN_GROUPS or len(values) < count:
        return None
    centre = _z(estimate, step)
    spread = np.array([_z(value, step) for value in values]) - centre
    error = math.sqrt((count - 1) / count * float((spread**2).sum()))
    if known_error is None:
        half = student_quantile(confidence, freedom or count - 1) * error
    else:
        half = normal_quantile(confidence) * max(known_error, error)
    low, high = math.tanh(centre - half), math.tanh(centre + half)
    return (-1.0 if estimate <= -1.0 else min(low, estimate)), (1.0 if estimate >= 1.0 else max(high, estimate))


def ratio_interval(
    parts: Sequence[float], weights: Sequence[float], groups: Sequence[Hashable], confidence: float = 0.95
) -> Interval | None:
    """Return the interval of sum(parts) / sum(weights), a mean over tokens of rows that are sampled by group.

    On the scale of the logarithm, since such a mean (a loss in nats a token) is positive and skewed to the right.
    Groups of unequal weight are worth fewer of equal weight, (sum of weights)^2 / sum of squares (Kish 1965): t has one
    degree of freedom less than that.

    Args:
        parts: what each row adds, not negative.
        weights: what each row weighs, positive.

    Returns:
        None with fewer than `MIN_GROUPS` groups, or where all that is left without one of them is 0.
    """
    parts_N, weights_N = np.asarray(parts, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    blocks = blocks_of(groups)
    count = int(blocks.max()) + 1 if len(blocks) else 0
    if count < MIN_GROUPS:
        return None
    sums_K, weighed_K = np.bincount(blocks, parts_N), np.bincount(blocks, weights_N)
    left_K = sums_K.sum() - sums_K
    if not (left_K > 0.0).all():
        return None
    centre = math.log(sums_K.sum() / weighed_K.sum())
    spread_K = np.log(left_K / (weighed_K.sum() - weighed_K)) - centre
    freedom = max(1.0, float(weighed_K.sum() ** 2 / (weighed_K**2).sum()) - 1.0)
    half = student_quantile(confidence, freedom) * math.sqrt((count - 1) / count * float((spread_K**2).sum()))
    return math.exp(centre - half), math.exp(min(centre + half, MOST_NATS))


def _z(value: float, step: float) -> float:
    return math.atanh(min(max(value, step - 1.0), 1.0 - step))
