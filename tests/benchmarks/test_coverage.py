"""The intervals hold the truth as often as they say, from five prompts up; the ones they replaced do not."""

import numpy as np
import pytest
from scipy.stats import norm

from benchmarks import coverage
from rlhf_core.evaluation.intervals import Interval, group_index, wilson_interval

RUNS = 400  # a standard error of 0.011 a world


def normal_interval(values: np.ndarray) -> Interval:
    """The mean's interval of before: normal whatever the number of values."""
    half = norm.ppf(0.975) * values.std(ddof=1) / len(values) ** 0.5
    return values.mean() - half, values.mean() + half


def effective_wilson(outcomes: np.ndarray, groups: list[int]) -> Interval:
    """The share's interval of before: a normal quantile, and a design effect of 1 or more."""
    index, share, count = group_index(groups), outcomes.mean(), len(outcomes)
    residuals = np.bincount(index, weights=outcomes - share)
    independent = share * (1 - share) / count
    num = len(residuals)
    if not independent:
        return wilson_interval(share * num, num)
    effective = count / max(1.0, num / (num - 1) * (residuals**2).sum() / count**2 / independent)
    return wilson_interval(share * effective, effective)


@pytest.mark.parametrize("prompts", [5, 8, 20])
def test_every_interval_holds_what_it_says(prompts: int) -> None:
    lines = coverage.coverage(coverage.worlds(), prompts, RUNS if prompts < 20 else RUNS // 2)
    assert {line.figure for line in lines} == {
        "pairwise accuracy", "mean, KL", "win rate", "held-out loss", "Spearman", "Kendall", "kappa", "alpha", "ECE",
    }  # fmt: skip
    for line in lines:
        most = 0.995 if line.figure == "ECE" else 0.975  # an error of 0 is the end of what there is
        assert 0.93 <= line.mean <= most, line
        assert line.lowest >= 0.89, line


def test_the_intervals_of_before_are_too_narrow_at_five_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "mean_interval", normal_interval)
    (line,) = coverage.coverage([coverage.means(skewed) for skewed in (0.0, 1.0, 2.0)], 5, RUNS)
    assert line.mean < 0.89
    monkeypatch.setattr(coverage, "grouped_share_interval", effective_wilson)
    (line,) = coverage.coverage([coverage.shares(0.6, 0.5)], 5, 2000)
    assert line.mean < 0.92
