"""Rank correlation between given grades and a model's scores, with row weights for the bootstrap."""

from collections.abc import Hashable, Sequence

import numpy as np

from rlhf_core.evaluation.intervals import group_index


def weighted_spearman(first_levels: np.ndarray, second_levels: np.ndarray, weights: np.ndarray) -> float | None:
    """Return Spearman's rho where row i stands `weights[i]` times; `None` when either side is constant.

    Takes levels (`np.unique(..., return_inverse=True)[1]`) in place of values: the order of the values does
    not change between resamples, so each one costs a count and a running sum and no sort.
    """
    total = weights.sum()
    if not total:
        return None
    first = _midranks(first_levels, weights)
    second = _midranks(second_levels, weights)
    first -= (weights * first).sum() / total
    second -= (weights * second).sum() / total
    first_square, second_square = (weights * first**2).sum(), (weights * second**2).sum()
    # Midranks are multiples of one half, so a constant side leaves rounding noise far below one quarter.
    if min(first_square, second_square) < 0.25 / total:
        return None
    rho = (weights * first * second).sum() / np.sqrt(first_square * second_square)
    return float(np.clip(rho, -1.0, 1.0))


def _midranks(levels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    held = np.bincount(levels, weights=weights)
    return (np.cumsum(held) - held + (held + 1.0) / 2.0)[levels]


def rank_levels(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return each value's level: 0 for the smallest distinct value, 1 for the next."""
    return np.unique(np.asarray(values, dtype=np.float64), return_inverse=True)[1]


def mean_spearman_within(
    groups: Sequence[Hashable], grades: Sequence[float] | np.ndarray, scores: Sequence[float] | np.ndarray
) -> tuple[float | None, int]:
    """Return the mean of Spearman's rho within each group, and how many groups it rests on.

    A group counts when it holds at least two distinct grades. Where the model gives all of them one score,
    its rho is undefined and enters as 0: a model that cannot tell responses apart must not gain by it. The
    mean is `None` when no group counts, or when the model tells responses apart in none of them.
    """
    index = group_index(groups)
    grade_values = np.asarray(grades, dtype=np.float64)
    score_values = np.asarray(scores, dtype=np.float64)
    order = np.argsort(index, kind="stable")
    bounds = np.flatnonzero(np.diff(index[order])) + 1
    correlations: list[float | None] = []
    for rows in np.split(order, bounds):
        given = rank_levels(grade_values[rows])
        if len(rows) and given.max() > 0:
            weights = np.ones(len(rows), dtype=np.int64)
            correlations.append(weighted_spearman(given, rank_levels(score_values[rows]), weights))
    if not any(rho is not None for rho in correlations):
        return None, len(correlations)
    return sum(rho or 0.0 for rho in correlations) / len(correlations), len(correlations)
