"""Intervals against published examples, other libraries and simulation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from statsmodels.stats.proportion import proportion_confint

from rlhf_core.evaluation.intervals import (
    bootstrap_by_group,
    grouped_share_interval,
    sign_test,
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
    assert (low, high) == pytest.approx(wilson_interval(70, 100), abs=2e-3)
    naive = wilson_interval(420, 600)
    assert high - low > 2 * (naive[1] - naive[0])


def test_grouped_interval_never_narrows():
    outcomes = [1.0, 0.0] * 50
    assert grouped_share_interval(outcomes, [row // 2 for row in range(100)]) == wilson_interval(50, 100)


def test_grouped_interval_of_unanimous_rows_counts_groups():
    assert grouped_share_interval([1.0] * 40, [row // 4 for row in range(40)]) == wilson_interval(10, 10)


def test_grouped_interval_covers_where_wilson_does_not():
    generator = np.random.default_rng(5)
    groups, inside, naive = np.repeat(np.arange(80), 6).tolist(), 0, 0
    for _ in range(400):
        rates = generator.beta(2.1, 0.9, 80)
        outcomes = (generator.random(480) < np.repeat(rates, 6)).astype(float).tolist()
        low, high = grouped_share_interval(outcomes, groups)
        inside += low <= 0.7 <= high
        low, high = wilson_interval(sum(outcomes), 480)
        naive += low <= 0.7 <= high
    assert inside / 400 >= 0.92
    assert naive / 400 < 0.88


def test_bootstrap_is_repeatable_and_near_the_normal_interval():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)

    def mean(weights: np.ndarray) -> float:
        return float((weights * values).sum() / weights.sum())

    first = bootstrap_by_group(range(400), mean, seed=4)
    assert first == bootstrap_by_group(range(400), mean, seed=4)
    assert first != bootstrap_by_group(range(400), mean, seed=5)
    assert first == pytest.approx((values.mean() - 0.196, values.mean() + 0.196), abs=0.05)


def test_bootstrap_draws_whole_groups():
    seen = []
    bootstrap_by_group(["a", "b", "a", "b"], lambda weights: seen.append(weights.tolist()), resamples=20)
    assert all(row[0] == row[2] and row[1] == row[3] and sum(row) == 4 for row in seen)


def test_bootstrap_of_one_group_or_of_undefined_draws_is_none():
    assert bootstrap_by_group(["a", "a"], lambda weights: 1.0) is None
    assert bootstrap_by_group(["a", "b"], lambda weights: None) is None
