"""Is P(chosen is better) = sigmoid(margin_scale * margin) as often right as it says: bins, and their error.

A pair has no natural first response, so it stands in both orientations: (p, 1) and (1 - p, 0). Folded on one half that
is: confidence c = max(p, 1 - p) in [0.5, 1], right when margin > 0 (margin 0: half right); ten equal bins of c.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, ndtr

from rlhf_core.evaluation.intervals import (
    MIN_GROUPS,
    bounds,
    finite,
    group_index,
    grouped_share_interval,
    student_quantile,
)

NUM_BINS = 10
Values = Sequence[float] | np.ndarray


def calibration_bins(
    margins: Values,
    num_bins: int = NUM_BINS,
    *,
    margin_scale: float = 1.0,
    confidence: float = 0.95,
    groups: Sequence[Hashable] | None = None,
) -> list[dict[str, Any]]:
    """Return the non-empty bins of the reliability diagram, in order of confidence.

    Each bin: `low`, `high` (its edges in [0.5, 1]), `count`, `num_groups`, `confidence` (mean predicted), `accuracy`
    (mean observed), `accuracy_low`, `accuracy_high` (over `groups`, the prompts of the pairs; None with fewer than
    five in the bin). The edge cases: confidence 0.5 falls into the first bin and 1 into the last.

    Raises ValueError for margins that are not finite.
    """
    values = finite("margins", margins)
    names = np.arange(len(values)) if groups is None else group_index(groups)
    predicted, right, place = _placed(values, margin_scale, num_bins)
    bins = []
    for number in np.unique(place):
        rows = place == number
        within = names[rows].tolist()
        bins.append(
            {
                "low": 0.5 + 0.5 * int(number) / num_bins,
                "high": 0.5 + 0.5 * (int(number) + 1) / num_bins,
                "count": int(rows.sum()),
                "num_groups": len(set(within)),
                "confidence": float(predicted[rows].mean()),
                "accuracy": float(right[rows].mean()),
                **bounds("accuracy", grouped_share_interval(right[rows], within, confidence)),
            }
        )
    return bins


def calibration_error(
    margins: Values,
    groups: Sequence[Hashable] | None = None,
    *,
    margin_scale: float = 1.0,
    confidence: float = 0.95,
    num_bins: int = NUM_BINS,
) -> dict[str, float | None]:
    """Return `ece`, `ece_low`, `ece_high` and `ece_plugin`; the bounds None with fewer than five groups.

    `ece_plugin` is the mean over pairs of |mean confidence - accuracy| of the pair's bin (Guo et al. 2017, eq. 3, on
    the folded confidence). Chance alone makes bins miss their confidence, so it reads above 0 for a perfect model.
    `ece` is the error at which a reading as large as `ece_plugin` is what one would expect: the observed gaps of all
    bins are scaled by one factor until the expectation of their mean absolute value, each with its binomial noise times
    the design effect of pairs that share a group, is the reading; 0 where noise alone expects more. The bounds are the
    errors at which the reading would lie t standard deviations above or below what is expected, t Student's with one
    degree of freedom less than groups.

    With `ece_plugin` 0 the gaps that were seen have no direction; then those of all bins are taken to be of one size.

    Raises ValueError for margins, or a scale, that are not finite.
    """
    values = finite("margins", margins)
    if not len(values):
        return {"ece": None, "ece_plugin": None} | bounds("ece", None)
    names = np.arange(len(values)) if groups is None else group_index(groups)
    predicted, right, place = _placed(values, margin_scale, num_bins)
    plugin, unit, reading = _readings(predicted, right, place, names)
    num_groups = int(names.max()) + 1
    interval = None
    if num_groups >= MIN_GROUPS:
        t = student_quantile(confidence, num_groups - 1)
        interval = _solve(plugin, unit, reading, t), _solve(plugin, unit, reading, -t)
    return {"ece": _solve(plugin, unit, reading, 0.0), "ece_plugin": plugin} | bounds("ece", interval)


def _placed(margins: np.ndarray, margin_scale: float, num_bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confidence, rightness and bin of each pair."""
    if not math.isfinite(margin_scale):
        raise ValueError(f"margin_scale is {margin_scale}; it must be finite")
    predicted = expit(margin_scale * np.abs(margins))
    right = (np.sign(margins) + 1.0) / 2.0
    place = np.clip(((predicted - 0.5) * 2.0 * num_bins).astype(np.int64), 0, num_bins - 1)
    return predicted, right, place


def _readings(
    predicted: np.ndarray, right: np.ndarray, place: np.ndarray, groups: np.ndarray
) -> tuple[float, float, Callable[[float], tuple[float, float]]]:
    """The plug-in error, that of a scale of 1, and what is expected to be read, with its variance, at any scale."""
    _, bins, counts = np.unique(place, return_inverse=True, return_counts=True)
    total = len(predicted)
    claimed = np.bincount(bins, weights=predicted) / counts
    gaps = claimed - np.bincount(bins, weights=right) / counts
    residuals = (predicted - right) - gaps[bins]
    cells = np.bincount(group_index(list(zip(groups.tolist(), bins.tolist(), strict=True))), weights=residuals)
    alone = float((residuals**2).sum())
    design = max(1.0, float((cells**2).sum()) / alone) if alone else 1.0
    weights, least = counts / total, 0.5 / (counts + 1.0)
    plugin = float((weights * np.abs(gaps)).sum())
    true_gaps = gaps if plugin > 0.0 else np.ones_like(gaps)

    def expected(scale: float) -> tuple[float, float]:
        share = np.clip(claimed - scale * true_gaps, least, 1.0 - least)
        means, variances = _folded_normal(scale * np.abs(true_gaps), np.sqrt(share * (1.0 - share) / counts * design))
        return float((weights * means).sum()), float((weights**2 * variances).sum())

    return plugin, plugin or 1.0, expected


def _folded_normal(means: np.ndarray, deviations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of |N(mean, deviation^2)|."""
    ratio = means / deviations
    folded = deviations * math.sqrt(2.0 / math.pi) * np.exp(-0.5 * ratio**2) + means * (1.0 - 2.0 * ndtr(-ratio))
    return folded, means**2 + deviations**2 - folded**2


def _solve(plugin: float, unit: float, expected: Callable[[float], tuple[float, float]], t: float) -> float:
    """The error whose expected reading, plus t of its standard deviations, is the one that was made."""

    def excess(scale: float) -> float:
        mean, variance = expected(scale)
        return mean + t * math.sqrt(variance) - plugin

    if excess(0.0) >= 0.0:
        return 0.0
    most = 1.0
    while excess(most) < 0.0 and most * unit < 1.0:
        most *= 2.0
    # where gaps drown the noise, the reading is just what is expected: excess is 0 at a scale of 1
    return min(1.0, float(brentq(excess, 0.0, most, xtol=1e-9)) * unit) if excess(most) >= 0.0 else 1.0
