"""Whether a reward model is unsure where it is wrong.

- `mean_deviation`: mean standard deviation of the held-out pairs' margins, in standardised scores.
- `wrong_correlation`: correlation of a pair's deviation with its being in the wrong order (a margin of 0 is half
  wrong); positive where the model is less sure of the pairs it gets wrong.
- `error_spearman`: over graded responses, rank correlation of a score's deviation with how far the given grade lies
  from the line that fits grades to scores best.

A figure that is undefined is None.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr

from rlhf_core.evaluation.intervals import bounds, grouped_share_interval, too_few, why_no_bounds
from rlhf_core.evaluation.response_scores import ResponseScore


def margin_deviations(
    chosen: Sequence[ResponseScore], rejected: Sequence[ResponseScore], unit: float
) -> list[float] | None:
    """Standard deviation of each pair's margin, in standardised scores; None where the model gives no deviations.

    Members of an ensemble are compared margin by margin: what they say of both responses alike does not count. What a
    model with a variance says of the two is taken to be independent.
    """
    deviations = []
    for one, other in zip(chosen, rejected, strict=True):
        if one.deviation is None or other.deviation is None:
            return None
        variance = one.deviation**2 + other.deviation**2
        if one.members:
            spread = _spread(one.members) + _spread(other.members)
            together = _spread(np.subtract(one.members, other.members))
            variance = max(variance - spread / unit**2, 0.0) + together / unit**2
        deviations.append(float(np.sqrt(variance)))
    return deviations


def _spread(scores: Sequence[float] | np.ndarray) -> float:
    """Variance of a sample of members, as `total_deviation` of the ensemble takes it; 0 for a single one."""
    return float(np.var(scores, ddof=1)) if len(scores) > 1 else 0.0


def uncertainty_figures(
    margins: Sequence[float],
    deviations: Sequence[float],
    graded: tuple[Sequence[float], Sequence[float], Sequence[float]],
) -> dict[str, float | None]:
    """The figures of the module's list.

    Args:
        margins: chosen less rejected score of the held-out pairs.
        deviations: of the margins.
        graded: given grades, scores and their deviations of the graded responses, each empty where there are none.
    """
    wrong = (1.0 - np.sign(margins)) / 2.0
    grades, scores, spread = (np.asarray(values, dtype=np.float64) for values in graded)
    error = None
    if len(grades) > 2 and np.ptp(scores) and np.ptp(spread):
        slope, level = np.polyfit(scores, grades, 1)
        distance = np.abs(grades - slope * scores - level)
        error = float(spearmanr(distance, spread).statistic) if np.ptp(distance) else None
    varied = len(margins) > 1 and np.ptp(wrong) and np.ptp(deviations)
    return {
        "mean_deviation": float(np.mean(deviations)) if len(deviations) else None,
        "wrong_correlation": float(pearsonr(deviations, wrong).statistic) if varied else None,
        "error_spearman": error,
    }


def right_share(margins: Sequence[float]) -> float | None:
    """Share of margins above 0, a margin of 0 counting half; None without any."""
    return float(((np.sign(margins) + 1.0) / 2.0).mean()) if len(margins) else None


def accuracy_figures(figure: str, margins: Sequence[float], prompts: Sequence[Hashable]) -> dict[str, Any]:
    """`figure`, the `right_share` of the margins, and its bounds over the prompts that the pairs are of.

    `undefined`, only where something is, says why.
    """
    right = (np.sign(margins) + 1.0) / 2.0
    found: dict[str, Any] = {figure: right_share(margins), **bounds(figure, grouped_share_interval(right, prompts))}
    reason = too_few(len(set(prompts))) if len(margins) else "no held-out pairs"
    undefined = why_no_bounds(found, figure, reason) | ({} if len(margins) else {figure: "no held-out pairs"})
    return found | ({"undefined": undefined} if undefined else {})


def member_margins(chosen: Sequence[ResponseScore], rejected: Sequence[ResponseScore]) -> list[list[float]]:
    """Margin of every pair by each member."""
    members = range(len(chosen[0].members)) if chosen else ()
    return [[one.members[k] - other.members[k] for one, other in zip(chosen, rejected, strict=True)] for k in members]


def majority_margins(chosen: Sequence[ResponseScore], rejected: Sequence[ResponseScore]) -> list[float]:
    """By how many more members are right than wrong of each pair; below 0 where more are wrong."""
    return [
        float(np.sign(np.subtract(one.members, other.members)).sum())
        for one, other in zip(chosen, rejected, strict=True)
    ]
