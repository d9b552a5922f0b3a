"""Intervals of rank correlations pooled over prompts, whose rows are not independent of each other.

Where every prompt has one row the rows are independent, and theory gives the standard error of Fisher's z: Bonett and
Wright 2000 for Spearman's rho, Fieller, Hartley and Pearson 1957 for Kendall's tau. Else it is the jackknife's over
prompts (`jackknife`).
"""

import math
from collections.abc import Hashable, Sequence

import numpy as np
from scipy.stats import kendalltau

from rlhf_core.evaluation.intervals import MIN_GROUPS, Interval
from rlhf_core.evaluation.jackknife import blocks_of, fisher_interval, leave_out
from rlhf_core.evaluation.ranks import Values, rank_levels, spearman


def rank_intervals(
    groups: Sequence[Hashable], grades: Values, scores: Values, confidence: float
) -> tuple[Interval | None, Interval | None]:
    """Return the intervals of Spearman's rho and of Kendall's tau-b between grades and scores.

    Rho of a sample is biased toward 0, by 3 (rho - tau) / (n + 1), which near 1 is more than its error (Kendall 1948,
    Rank correlation methods, on Daniels): the interval's outer end is moved by as much.

    Returns:
        None in place of an interval with fewer than `MIN_GROUPS` groups, or where leaving one out makes either
        side constant.
    """
    first, second = rank_levels(grades), rank_levels(scores)
    rows, count = np.arange(len(first)), len(first)
    if count < MIN_GROUPS:
        return None, None
    blocks = blocks_of(groups)

    def kendall(kept: np.ndarray) -> float | None:
        value = float(kendalltau(first[kept], second[kept], variant="b").statistic)
        return None if math.isnan(value) else value

    tau, rho = kendall(rows), spearman(first, second)
    if tau is None or rho is None:
        return None, None
    taus, rhos = leave_out(blocks, kendall), leave_out(blocks, lambda kept: spearman(first[kept], second[kept]))
    single = len(set(groups)) == count
    rho_error = math.sqrt((1.0 + rho**2 / 2.0) / (count - 3)) if single else None
    tau_error = math.sqrt(0.437 / (count - 4)) if single else None
    step, tau_step = 12.0 / (count**3 - count), 4.0 / (count**2 - count)
    freedom = int(blocks.max()) + 1  # one more than the error has: by coverage, as of `grouped_share_interval`
    of_rho = fisher_interval(rho, rhos, confidence, step=step, known_error=rho_error, freedom=freedom)
    of_tau = fisher_interval(tau, taus, confidence, step=tau_step, known_error=tau_error, freedom=freedom)
    return of_rho and _without_bias(of_rho, rho, tau, count, step), of_tau


def _without_bias(interval: Interval, rho: float, tau: float, count: int, step: float) -> Interval:
    """Move the end that is further from 0 outward, on the scale of z, by what sampling takes from rho."""

    def z(value: float) -> float:
        return math.atanh(min(max(value, step - 1.0), 1.0 - step))

    shift = z(((count + 1) * rho - 3.0 * tau) / (count - 2)) - z(rho)
    low, high = interval
    if rho > 0:
        return low, max(high, math.tanh(z(high) + shift))
    return min(low, math.tanh(z(low) + shift)), high
