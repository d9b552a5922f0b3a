"""Whether a model is unsure where it is wrong: by hand and against SciPy."""

import math
import statistics

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr

from rlhf_core.evaluation.intervals import wilson_interval
from rlhf_core.evaluation.response_scores import ResponseScore
from rlhf_core.evaluation.uncertainty import (
    accuracy_figures,
    majority_margins,
    margin_deviations,
    member_margins,
    right_share,
    uncertainty_figures,
)
from rlhf_core.models.scoring.ensemble import total_deviation


def readings(*members: tuple[float, ...], deviation: float | None = None) -> list[ResponseScore]:
    return [ResponseScore(score=float(np.mean(one)), members=one, deviation=deviation) for one in members]


def test_independent_deviations_add_in_squares() -> None:
    chosen, rejected = [ResponseScore(score=1.0, deviation=3.0)], [ResponseScore(score=0.0, deviation=4.0)]
    assert margin_deviations(chosen, rejected, 1.0) == [5.0]
    assert margin_deviations([ResponseScore(score=1.0)], [ResponseScore(score=0.0)], 1.0) is None


def test_what_members_say_of_both_responses_alike_does_not_count() -> None:
    """Members differ by 10 in level and agree on the margin; a second pair has margins 1 and 3, in units of 2.

    The deviations are those that the ensemble itself gives, so that the two ways of taking a spread are one.
    """
    unit = 2.0

    def reading(*members: float) -> ResponseScore:
        deviation = total_deviation(torch.tensor(members)[:, None], None).item() / unit
        return ResponseScore(score=0.0, members=members, deviation=deviation)

    chosen, rejected = [reading(1.0, 11.0), reading(1.0, 3.0)], [reading(0.0, 10.0), reading(0.0, 0.0)]
    expected = [0.0, statistics.stdev([1.0, 3.0]) / unit]
    assert margin_deviations(chosen, rejected, unit) == pytest.approx(expected, abs=1e-6)


def test_own_deviations_of_members_stay_in_the_margin() -> None:
    """Spread 2 of the chosen side and own deviation 2 of each: 6 and 4 in squares; the margin has 2 + 4 + 4."""
    chosen = [ResponseScore(score=0.0, members=(1.0, 3.0), deviation=math.sqrt(6.0))]
    rejected = [ResponseScore(score=0.0, members=(0.0, 0.0), deviation=2.0)]
    assert margin_deviations(chosen, rejected, 1.0) == pytest.approx([math.sqrt(10.0)])


def test_figures_against_scipy() -> None:
    rng = np.random.default_rng(0)
    margins, deviations = rng.normal(size=40), rng.uniform(0.1, 2.0, 40)
    margins[3] = 0.0
    scores, spread = rng.normal(size=30), rng.uniform(0.1, 2.0, 30)
    grades = 2.0 * scores + 1.0 + rng.normal(size=30) * spread
    found = uncertainty_figures(margins.tolist(), deviations.tolist(), (grades, scores, spread))
    wrong = np.where(margins == 0, 0.5, margins < 0)
    assert found["mean_deviation"] == pytest.approx(deviations.mean())
    assert found["wrong_correlation"] == pytest.approx(pearsonr(deviations, wrong).statistic)
    slope = np.cov(scores, grades, bias=True)[0, 1] / scores.var()
    distance = np.abs(grades - grades.mean() - slope * (scores - scores.mean()))
    assert found["error_spearman"] == pytest.approx(spearmanr(distance, spread).statistic)
    assert found["error_spearman"] > 0.2, "made so that errors grow with the spread"


def test_what_is_undefined_is_none() -> None:
    nothing = {"mean_deviation": None, "wrong_correlation": None, "error_spearman": None}
    assert uncertainty_figures([], [], ([], [], [])) == nothing
    all_right = uncertainty_figures([1.0, 2.0], [0.5, 0.1], ([1.0, 2.0, 3.0], [1.0, 1.0, 1.0], [0.1, 0.2, 0.3]))
    assert all_right == {"mean_deviation": 0.3, "wrong_correlation": None, "error_spearman": None}


def test_accuracies_of_members_and_of_their_majority() -> None:
    """Three members on three pairs: right or wrong one by one, and by the number of them that is right."""
    chosen = readings((1.0, 1.0, 0.0), (1.0, 0.0, 0.0), (1.0, 0.0, 0.5))
    rejected = readings((0.0, 0.0, 1.0), (0.0, 1.0, 1.0), (0.0, 1.0, 0.5))
    assert [right_share(own) for own in member_margins(chosen, rejected)] == pytest.approx([1.0, 1 / 3, 1 / 6])
    assert right_share(majority_margins(chosen, rejected)) == pytest.approx((1.0 + 0.0 + 0.5) / 3)
    assert right_share([]) is None
    assert member_margins([], []) == []


def test_accuracies_have_bounds_over_prompts_from_five_prompts_up() -> None:
    margins = [1.0, -1.0, 1.0, 1.0, 1.0, 0.0]
    found = accuracy_figures("majority_accuracy", margins, list("abcdef"))
    low, high = wilson_interval(4.5, 6)
    assert found == {
        "majority_accuracy": 0.75, "majority_accuracy_low": pytest.approx(low),
        "majority_accuracy_high": pytest.approx(high),
    }  # fmt: skip
    assert accuracy_figures("pairwise_accuracy", margins, list("abcdda")) == {
        "pairwise_accuracy": 0.75, "pairwise_accuracy_low": None, "pairwise_accuracy_high": None,
        "undefined": dict.fromkeys(
            ("pairwise_accuracy_low", "pairwise_accuracy_high"), "too few prompts: 4, an interval needs 5"
        ),
    }  # fmt: skip
    nothing = accuracy_figures("pairwise_accuracy", [], [])
    assert nothing["undefined"] == dict.fromkeys(
        ("pairwise_accuracy_low", "pairwise_accuracy_high", "pairwise_accuracy"), "no held-out pairs"
    )
