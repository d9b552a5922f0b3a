"""Intervals against published examples, other libraries and simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from scipy.stats import skew as scipy_skew
from scipy.stats import t as student
from statsmodels.stats.proportion import proportion_confint

from rlhf_core.evaluation.intervals import (
    grouped_share_interval,
    mean_interval,
    sign_test,
    too_few,
    wilson_interval,
    win_rate_interval,
)

COUNTS = st.integers(0, 400)


@given(st.integers(1, 3000), st.floats(0, 1), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_is_that_of_statsmodels(count: int, share: float, confidence: float):
    successes = round(share * count)
    expected = proportion_confint(successes, count, 1 - confidence, method="wilson")
    assert wilson_interval(successes, count, confidence) == pytest.approx(expected, abs=1e-12)


def test_wilson_bounds_are_exact_at_the_ends():
    for count in range(1, 300):
        assert wilson_interval(0, count)[0] == 0.0
        assert wilson_interval(count, count)[1] == 1.0


@pytest.mark.parametrize(("successes", "count"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_share(successes: int, count: int):
    with pytest.raises(ValueError, match="no share"):
        wilson_interval(successes, count)


@pytest.mark.parametrize(
    ("wins", "losses", "count", "confidence", "low", "high"),
    [
        (9, 3, 32, 0.95, -0.027, 0.390),  # Tango 1998, section 6.2: sleeping difficulties
        (7, 1, 21, 0.95, 0.026, 0.517),  # Fagerland, Lydersen and Laake 2014: airway reactivity
        (28, 25, 618, 0.90, -0.0148, 0.0247),  # PropCIs::scoreci.mp(25, 28, 618, 0.90) in R
    ],
)
def test_difference_of_paired_shares_is_the_published_one(wins, losses, count, confidence, low, high):
    interval = win_rate_interval(wins, count - wins - losses, losses, confidence)
    assert [2 * bound - 1 for bound in interval] == pytest.approx([low, high], abs=6e-4)


@given(COUNTS, COUNTS)
def test_win_rate_interval_without_ties_is_wilson(wins: int, losses: int):
    if wins + losses:
        expected = wilson_interval(wins, wins + losses)
        assert win_rate_interval(wins, 0, losses) == pytest.approx(expected, abs=1e-9)


@given(COUNTS, COUNTS, COUNTS)
def test_win_rate_interval_holds_the_estimate_and_mirrors(wins: int, ties: int, losses: int):
    if wins + ties + losses == 0:
        return
    low, high = win_rate_interval(wins, ties, losses)
    rate = (wins + ties / 2) / (wins + ties + losses)
    assert 0 <= low <= rate + 1e-12
    assert rate - 1e-12 <= high <= 1
    assert high > low
    mirrored = win_rate_interval(losses, ties, wins)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-9)


@pytest.mark.parametrize("shares", [(0.5, 0.0), (0.45, 0.2), (0.7, 0.1), (0.3, 0.65), (0.9, 0.08)])
@pytest.mark.parametrize("count", [50, 500])
def test_win_rate_interval_covers_the_truth_as_often_as_it_says(shares: tuple[float, float], count: int):
    win, tie = shares
    draws = np.random.default_rng(3).multinomial(count, [win, tie, 1 - win - tie], size=1500)
    distinct, times = np.unique(draws, axis=0, return_counts=True)
    inside = 0
    for row, repeated in zip(distinct.tolist(), times.tolist(), strict=True):
        low, high = win_rate_interval(*row)
        inside += repeated * (low <= win + tie / 2 <= high)
    # 1500 draws: a standard error of 0.0056; a Wald interval falls to 0.92 and below in the skewed cases.
    assert 0.93 <= inside / 1500 <= 0.985


def test_win_rate_interval_refuses_no_comparison():
    with pytest.raises(ValueError, match="no comparison"):
        win_rate_interval(0, 0, 0)


@given(COUNTS, COUNTS)
def test_sign_test_is_the_binomial_test(wins: int, losses: int):
    expected = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert sign_test(wins, losses) == pytest.approx(expected, rel=1e-12)


def test_sign_test_by_hand():
    assert sign_test(5, 0) == pytest.approx(2 / 32)
    assert sign_test(3, 1) == pytest.approx(2 * (1 + 4) / 16)


def test_grouped_interval_counts_copies_once():
    outcomes = ([1.0] * 70 + [0.0] * 30) * 6
    groups = list(range(100)) * 6
    low, high = grouped_share_interval(outcomes, groups)
    assert (low, high) == pytest.approx(wilson_interval(70, 100), abs=4e-3)
    naive = wilson_interval(420, 600)
    assert high - low > 2 * (naive[1] - naive[0])


def test_groups_that_are_all_alike_narrow_no_further_than_chance_would():
    outcomes = [1.0, 0.0] * 50
    low, high = grouped_share_interval(outcomes, [row // 2 for row in range(100)])
    assert 0.4 < low < 0.45, "each of 50 prompts is half right, and that is no proof that all are"
    assert high - low < np.diff(wilson_interval(50, 100))[0]


def test_one_row_a_group_is_a_plain_share():
    assert grouped_share_interval([1.0] * 7 + [0.0] * 3, range(10)) == wilson_interval(7, 10)


def test_grouped_interval_of_unanimous_rows_counts_groups():
    assert grouped_share_interval([1.0] * 40, [row // 4 for row in range(40)]) == wilson_interval(10, 10)


def test_fewer_than_five_groups_give_no_interval():
    assert grouped_share_interval([1.0, 0.0] * 6, [row // 3 for row in range(12)]) is None
    assert grouped_share_interval([1.0, 0.0] * 6, [row % 5 for row in range(12)]) is not None
    assert mean_interval([1.0, 2.0, 3.0, 4.0]) is None
    assert too_few(4) == "too few prompts: 4, an interval needs 5"
    assert too_few(5) is None


def test_mean_interval_is_that_of_t_without_skewness_and_mirrors():
    values = [-3.0, -1.0, 0.0, 1.0, 3.0, 0.0]
    half = student.ppf(0.975, 5) * np.std(values, ddof=1) / math.sqrt(6)
    assert mean_interval(values) == pytest.approx((-half, half))
    skewed = np.array([0.1, 0.2, 0.4, 0.5, 3.0, 0.3])
    low, high = mean_interval(skewed)
    assert high - skewed.mean() > skewed.mean() - low, "the long tail is above"
    assert mean_interval(-skewed) == pytest.approx((-high, -low))
    assert mean_interval(skewed * 7 + 1) == pytest.approx((low * 7 + 1, high * 7 + 1))
    assert mean_interval([0.25] * 9) == (0.25, 0.25)


def test_mean_interval_takes_the_skewness_out_as_hall_says():
    """Both ends solve Hall's cubic: root n times the transformed distance is t."""
    values = np.random.default_rng(4).exponential(size=12)
    count, spread = 12, values.std(ddof=1)
    a = scipy_skew(values, bias=False)
    for end, sign in zip(mean_interval(values), (1, -1), strict=True):
        w = (values.mean() - end) / spread
        hall = w + a * w**2 / 3 + a**2 * w**3 / 27 + a / (6 * count)
        assert math.sqrt(count) * hall == pytest.approx(sign * student.ppf(0.975, 11))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_has_no_interval(wrong: float):
    with pytest.raises(ValueError, match=r"values\[4\] is"):
        mean_interval([1.0, 2.0, 3.0, 4.0, wrong])
    with pytest.raises(ValueError, match=r"outcomes\[4\] is"):
        grouped_share_interval([1.0, 0.0, 1.0, 0.0, wrong], range(5))
