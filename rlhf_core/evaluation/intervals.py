"""Confidence intervals and exact tests for shares, win rates with ties, and figures over grouped rows.

All intervals are two-sided. Nothing here draws a random number except `bootstrap_by_group`, which takes a seed.
"""

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binomtest, norm

Interval = tuple[float, float]


def normal_quantile(confidence: float) -> float:
    """Return z such that a standard normal lies within plus or minus z with probability `confidence`."""
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence {confidence} must lie strictly between 0 and 1")
    return float(norm.ppf(0.5 + confidence / 2.0))


def wilson_interval(successes: float, count: float, confidence: float = 0.95) -> Interval:
    """Return Wilson's score interval for a share (Wilson 1927).

    `successes` and `count` may be fractions: ties count half, and grouped rows bring an effective count.
    """
    if count <= 0 or not 0.0 <= successes <= count:
        raise ValueError(f"{successes} successes of {count} are no share")
    z = normal_quantile(confidence)
    share = successes / count
    centre = (share + z * z / (2.0 * count)) / (1.0 + z * z / count)
    half = z / (1.0 + z * z / count) * math.sqrt(share * (1.0 - share) / count + z * z / (4.0 * count * count))
    # At a share of exactly 0 or 1 the bound is that share; floating point would leave a last-bit remainder.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == count else min(1.0, centre + half)
    return low, high


def grouped_share_interval(outcomes: Sequence[float], groups: Sequence[Hashable], confidence: float = 0.95) -> Interval:
    """Return an interval for the mean of `outcomes` (each in [0, 1]) when rows of one group are not independent.

    Wilson's interval on an effective count: the number of rows over the design effect, which is the
    between-group variance of the ratio estimate over the variance independent rows would have (Rao and
    Scott 1992). The design effect is never taken below 1, so that grouping cannot narrow an interval. Where
    every outcome is the same it cannot be estimated, and the count is the number of groups.
    """
    values = np.asarray(outcomes, dtype=np.float64)
    if len(values) != len(groups) or not len(values):
        raise ValueError(f"{len(values)} outcomes for {len(groups)} groups")
    index = group_index(groups)
    num_groups = int(index.max()) + 1
    count, share = len(values), float(values.mean())
    independent = float(((values - share) ** 2).mean()) / count
    if num_groups < 2 or independent == 0.0:
        return wilson_interval(share * num_groups, num_groups, confidence)
    residuals = np.bincount(index, weights=values - share, minlength=num_groups)
    between = num_groups / (num_groups - 1) * float((residuals**2).sum()) / count**2
    effective = count / max(1.0, between / independent)
    return wilson_interval(share * effective, effective, confidence)


def win_rate_interval(wins: int, ties: int, losses: int, confidence: float = 0.95) -> Interval:
    """Return the interval of (wins + ties / 2) / n: Tango's score interval for paired shares (Tango 1998).

    The win rate is (1 + d) / 2 with d = P(win) - P(loss), the difference of two paired proportions. The
    interval holds every d that the score test, with the nuisance parameter at its constrained maximum
    likelihood, does not reject; it is never empty and never a point, even when all rows are ties.
    """
    count = wins + ties + losses
    if min(wins, ties, losses) < 0 or count == 0:
        raise ValueError(f"{wins} wins, {ties} ties, {losses} losses are no comparison")
    z = normal_quantile(confidence)
    observed = (wins - losses) / count

    def excess(difference: float, bound: float) -> float:
        return _tango_statistic(wins, losses, count, difference) - bound

    edge = 1.0 - 1e-12
    low = -1.0 if losses == count else brentq(excess, -edge, min(observed, edge), args=(z,), xtol=1e-13)
    high = 1.0 if wins == count else brentq(excess, max(observed, -edge), edge, args=(-z,), xtol=1e-13)
    return (1.0 + low) / 2.0, (1.0 + high) / 2.0


def _tango_statistic(wins: int, losses: int, count: int, difference: float) -> float:
    """Return the score statistic of H0: P(win) - P(loss) = difference (Tango 1998, eq. 10)."""
    a = 2.0 * count
    b = -wins - losses + (2.0 * count - wins + losses) * difference
    c = -losses * difference * (1.0 - difference)
    loss_share = (math.sqrt(max(0.0, b * b - 4.0 * a * c)) - b) / (2.0 * a)
    variance = count * (2.0 * loss_share + difference * (1.0 - difference))
    gap = wins - losses - count * difference
    if variance <= 0.0:
        return 0.0 if gap == 0.0 else math.copysign(math.inf, gap)
    return gap / math.sqrt(variance)


def sign_test(wins: int, losses: int) -> float:
    """Return the exact two-sided p-value of "wins and losses are equally likely"; ties take no part."""
    return float(binomtest(wins, wins + losses, 0.5).pvalue) if wins + losses else 1.0


def group_index(groups: Sequence[Hashable]) -> np.ndarray:
    """Return each row's group number, groups numbered by first appearance."""
    numbers: dict[Hashable, int] = {}
    return np.asarray([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)


def bootstrap_by_group(
    groups: Sequence[Hashable],
    statistic: Callable[[np.ndarray], float | None],
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval | None:
    """Return the percentile interval of a statistic when whole groups are drawn with replacement.

    `statistic` gets one weight a row (how often its group was drawn) and returns `None` where it is
    undefined; such draws are left out. `None` comes back when fewer than two groups exist or when more than
    one draw in twenty is undefined.
    """
    index = group_index(groups)
    num_groups = int(index.max()) + 1 if len(index) else 0
    if num_groups < 2:
        return None
    generator = np.random.Generator(np.random.PCG64(seed))
    values = []
    for _ in range(resamples):
        drawn = np.bincount(generator.integers(num_groups, size=num_groups), minlength=num_groups)
        value = statistic(drawn[index])
        if value is not None:
            values.append(value)
    if len(values) < 0.95 * resamples:
        return None
    low, high = np.quantile(values, [(1.0 - confidence) / 2.0, (1.0 + confidence) / 2.0])
    return float(low), float(high)
