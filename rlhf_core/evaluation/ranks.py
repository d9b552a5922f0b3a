"""Rank correlation between given grades and a model's scores, pooled and within prompts."""

from collections.abc import Hashable, Sequence

import numpy as np

from rlhf_core.evaluation.intervals import finite, group_index

Values = Sequence[float] | np.ndarray


def spearman(first: Values, second: Values) -> float | None:
    """Return Spearman's rho, equal values sharing their mean rank; `None` when either side is constant."""
    ranks = [_midranks(rank_levels(side)) for side in (first, second)]
    if not len(ranks[0]):
        return None
    one, other = (side - side.mean() for side in ranks)
    # Midranks are multiples of one half, so a constant side leaves rounding noise far below one quarter.
    if min(one @ one, other @ other) < 0.25 / len(one):
        return None
    return float(np.clip(one @ other / np.sqrt((one @ one) * (other @ other)), -1.0, 1.0))


def _midranks(levels: np.ndarray) -> np.ndarray:
    held = np.bincount(levels)
    return (np.cumsum(held) - held + (held + 1.0) / 2.0)[levels]


def rank_levels(values: Values) -> np.ndarray:
    """Return each value's level: 0 for the smallest distinct value, 1 for the next.

    Raises ValueError for NaN, which sorting takes for the largest, and for infinity.
    """
    return np.unique(finite("values", values), return_inverse=True)[1]


def spearman_within(groups: Sequence[Hashable], grades: Values, scores: Values) -> list[float | None]:
    """Return Spearman's rho within each group that holds at least two distinct grades, by first appearance.

    Where the model gives all responses of a group one score, its rho is undefined: `None`. In a mean it counts as 0: a
    model that cannot tell responses apart must not gain by it.
    """
    index = group_index(groups)
    grade_values = np.asarray(grades, dtype=np.float64)
    score_values = np.asarray(scores, dtype=np.float64)
    order = np.argsort(index, kind="stable")
    edges = np.flatnonzero(np.diff(index[order])) + 1
    correlations: list[float | None] = []
    for rows in np.split(order, edges):
        if len(rows) and np.ptp(grade_values[rows]):
            correlations.append(spearman(grade_values[rows], score_values[rows]))
    return correlations
