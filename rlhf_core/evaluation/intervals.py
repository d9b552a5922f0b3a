"""Confidence intervals and exact tests for shares, win rates with ties, and means over prompts.

All intervals are two-sided, and nothing here draws a random number. Rows of one prompt are one group: what is sampled
is prompts. An interval that would rest on fewer than `MIN_GROUPS` of them is not given: so few say nothing about how
much prompts differ. How often each interval holds the truth is measured by `python -m benchmarks.coverage`.
"""

import math
import sys
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binomtest, norm
from scipy.stats import t as student

Interval = tuple[float, float]

MIN_GROUPS = 5
"""Fewest prompts that an interval may rest on."""

MOST_NATS = math.log(sys.float_info.max)
"""Where `exp` ends."""


def perplexity(nats: float) -> float | None:
    """exp of a loss in nats a token; None where no float is as large."""
    return math.exp(nats) if nats < MOST_NATS else None


def too_few(count: int, what: str = "prompts", least: int = MIN_GROUPS) -> str | None:
    """Why an interval over so many groups is not given; None where it is."""
    return f"too few {what}: {count}, an interval needs {least}" if count < least else None


def bounds(figure: str, interval: Interval | None) -> dict[str, float | None]:
    """Return `<figure>_low` and `<figure>_high`; both None without an interval."""
    low, high = interval or (None, None)
    return {f"{figure}_low": low, f"{figure}_high": high}


def why_no_bounds(found: Mapping[str, Any], figure: str, reason: str | None) -> dict[str, str]:
    """The reason under each bound of `figure` that `found` has no number for: entries of `undefined`."""
    names = (f"{figure}_low", f"{figure}_high")
    return {name: reason or "undefined" for name in names if found.get(name) is None}


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
    return _wilson(successes / count, count, normal_quantile(confidence))


def _wilson(share: float, count: float, z: float) -> Interval:
    centre = (share + z * z / (2.0 * count)) / (1.0 + z * z / count)
    half = z / (1.0 + z * z / count) * math.sqrt(share * (1.0 - share) / count + z * z / (4.0 * count * count))
    # At a share of exactly 0 or 1 the bound is that share; floating point would leave a last-bit remainder.
    low = 0.0 if share == 0.0 else max(0.0, centre - half)
    high = 1.0 if share == 1.0 else min(1.0, centre + half)
    return low, high


def student_quantile(confidence: float, freedom: float) -> float:
    """Return t such that Student's t with `freedom` degrees lies within plus or minus t with that probability."""
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence {confidence} must lie strictly between 0 and 1")
    return float(student.ppf(0.5 + confidence / 2.0, freedom))


def grouped_share_interval(
    outcomes: Sequence[float] | np.ndarray, groups: Sequence[Hashable], confidence: float = 0.95
) -> Interval | None:
    """Return an interval for the mean of `outcomes` (each in [0, 1]) when rows of one group are not independent.

    Wilson's interval on an effective count, with Student's t in place of the normal quantile: the number of rows over
    the design effect, which is the between-group variance of the ratio estimate over the variance independent rows
    would have (Rao and Scott 1992). From few groups the design effect is itself a guess with a relative error of
    sqrt(2 / (groups - 1)): it is taken for no less than two such errors below 1, and one quarter at least, so that
    groups that happen to be alike cannot narrow the interval to a point. t has as many degrees of freedom as there are
    groups: one more than the variance has, because Wilson's pull to the middle already widens the interval where groups
    are few; that, too, was chosen by coverage. Where every outcome is the same the design effect cannot be estimated,
    and the count is the number of groups. A row in each group is a plain share, and its interval Wilson's own.

    Returns:
        The interval; None with fewer than `MIN_GROUPS` groups.
    """
    values = finite("outcomes", outcomes)
    if len(values) != len(groups):
        raise ValueError(f"{len(values)} outcomes for {len(groups)} groups")
    index = group_index(groups)
    num_groups = int(index.max()) + 1 if len(index) else 0
    if num_groups < MIN_GROUPS:
        return None
    count, share = len(values), float(values.mean())
    independent = float(((values - share) ** 2).mean()) / count
    if independent == 0.0 or num_groups == count:
        return wilson_interval(share * num_groups, num_groups, confidence)
    residuals = np.bincount(index, weights=values - share, minlength=num_groups)
    between = num_groups / (num_groups - 1) * float((residuals**2).sum()) / count**2
    least = max(0.25, 1.0 - 2.0 * math.sqrt(2.0 / (num_groups - 1)))
    effective = count / max(least, between / independent)
    return _wilson(share, effective, student_quantile(confidence, num_groups))


def mean_interval(values: Sequence[float] | np.ndarray, confidence: float = 0.95) -> Interval | None:
    """Return an interval for the mean of independent values, one a prompt, skewed or not.

    Hall's transformation of the studentised mean (Hall 1992, "On the removal of skewness by transformation"), which is
    monotone and takes the sample's skewness out, against Student's t with one degree of freedom less than values. With
    no skewness it is the t interval. Values that are all the same give a point.

    Returns:
        The interval; None for fewer than `MIN_GROUPS` values.
    """
    sample = finite("values", values)
    count = len(sample)
    if count < MIN_GROUPS:
        return None
    mean, deviation = float(sample.mean()), float(sample.std(ddof=1))
    if np.ptp(sample) == 0.0:
        return mean, mean
    third = float((((sample - mean) / sample.std()) ** 3).mean())
    skewness = third * math.sqrt(count * (count - 1)) / (count - 2)
    reach = student_quantile(confidence, count - 1) / math.sqrt(count)
    low, high = (mean - deviation * _unskewed(end, skewness, count) for end in (reach, -reach))
    return low, high


def _unskewed(reach: float, skewness: float, count: int) -> float:
    """Inverse of Hall's W + a W^2 / 3 + a^2 W^3 / 27 + a / (6 n) = ((1 + a W / 3)^3 - 1) / a + a / (6 n)."""
    if abs(skewness) < 1e-6:
        return reach
    return 3.0 / skewness * (math.cbrt(1.0 + skewness * (reach - skewness / (6.0 * count))) - 1.0)


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


def finite(name: str, values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return the values as float64; one NaN would otherwise turn every figure after it into a silent lie."""
    array = np.asarray(values, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        raise ValueError(f"{name}[{bad[0]}] is {array[bad[0]]}; it must be finite")
    return array


def group_index(groups: Sequence[Hashable]) -> np.ndarray:
    """Return each row's group number, groups numbered by first appearance."""
    numbers: dict[Hashable, int] = {}
    return np.asarray([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)
