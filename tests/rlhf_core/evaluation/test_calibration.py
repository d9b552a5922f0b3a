"""Calibration: worked examples, the definition over both orientations, and how the error reads where it is known."""

import math

import numpy as np
import pytest

from rlhf_core.evaluation.calibration import calibration_bins, calibration_error
from rlhf_core.evaluation.intervals import grouped_share_interval


def draw(generator: np.random.Generator, prompts: int, each: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Margins of a model whose log-odds are the true ones over `scale`, and the prompt of each pair."""
    margins = np.abs(generator.normal(0, 2, prompts * each))
    right = generator.random(prompts * each) < 1 / (1 + np.exp(-scale * margins))
    return np.where(right, margins, -margins), np.repeat(np.arange(prompts), each)


def true_error(scale: float) -> float:
    """The ten bins' mean gap of a model with log-odds too large by 1 / scale, by integration over a fine grid."""
    margins = np.abs(np.random.default_rng(0).normal(0, 2, 1_000_000))
    claimed, rate = 1 / (1 + np.exp(-margins)), 1 / (1 + np.exp(-scale * margins))
    place = np.minimum(((claimed - 0.5) * 20).astype(int), 9)
    return float(np.abs(np.bincount(place, weights=claimed - rate)).sum() / len(margins))


def test_bins_by_hand():
    margin = math.log(3)  # confidence 3/4
    bins = calibration_bins([margin, margin, margin, -margin, 0.0, 0.0])
    assert [(entry["count"], entry["accuracy"]) for entry in bins] == [(2, 0.5), (4, 0.75)]
    assert [entry["confidence"] for entry in bins] == pytest.approx([0.5, 0.75])
    assert calibration_error([margin, margin, margin, -margin, 0.0, 0.0])["ece_plugin"] == pytest.approx(0.0)
    assert calibration_error([margin, -margin])["ece_plugin"] == pytest.approx(0.25)


def test_the_plain_error_is_that_of_both_orientations():
    margins = np.random.default_rng(2).normal(0.8, 1.5, 700)
    predicted = np.concatenate([1 / (1 + np.exp(-margins)), 1 / (1 + np.exp(margins))])
    outcome = np.concatenate([np.ones(700), np.zeros(700)])
    place = np.minimum((predicted * 20).astype(int), 19)
    expected = sum(
        abs(predicted[place == index].mean() - outcome[place == index].mean()) * (place == index).mean()
        for index in np.unique(place)
    )
    assert calibration_error(margins)["ece_plugin"] == pytest.approx(expected, abs=1e-12)


def test_margins_of_standardised_scores_are_scaled_back():
    margins = np.random.default_rng(0).normal(1.0, 2.0, 500)
    scaled, plain = calibration_bins(margins / 4, margin_scale=4.0), calibration_bins(margins)
    assert [entry["count"] for entry in scaled] == [entry["count"] for entry in plain]
    assert [entry["confidence"] for entry in scaled] == pytest.approx([entry["confidence"] for entry in plain])
    assert calibration_error(margins / 4, margin_scale=4.0) == pytest.approx(calibration_error(margins))


def test_bars_of_a_bin_go_by_prompts():
    margin = math.log(3)
    rows = [margin, margin, -margin, margin, -margin, -margin, margin, margin, margin, -margin, margin, margin]
    prompts = [row // 2 for row in range(12)]
    (entry,) = calibration_bins(rows, groups=prompts)
    right = [(math.copysign(1, row) + 1) / 2 for row in rows]
    assert (entry["num_groups"], entry["count"]) == (6, 12)
    assert (entry["accuracy_low"], entry["accuracy_high"]) == grouped_share_interval(right, prompts)
    (entry,) = calibration_bins(rows, groups=[row // 3 for row in range(12)])
    assert (entry["accuracy_low"], entry["accuracy_high"]) == (None, None), "four prompts are too few"


def test_a_perfect_model_reads_near_nothing_and_its_bound_is_nothing():
    """200 pairs: the plain error reads 0.07 for it."""
    generator = np.random.default_rng(7)
    found = [calibration_error(*draw(generator, 200, 1, 1.0)) for _ in range(300)]
    assert np.mean([one["ece_plugin"] for one in found]) > 0.06
    assert np.mean([one["ece"] for one in found]) < 0.03
    assert np.mean([one["ece_low"] == 0.0 for one in found]) > 0.95


@pytest.mark.parametrize(("prompts", "each", "scale"), [(50, 4, 0.4), (200, 1, 0.4), (300, 4, 2.5), (8, 4, 0.4)])
def test_error_of_a_model_that_is_too_sure_or_not_sure_enough(prompts: int, each: int, scale: float):
    generator, truth = np.random.default_rng(11), true_error(scale)
    found = [calibration_error(*draw(generator, prompts, each, scale)) for _ in range(300)]
    assert np.mean([one["ece"] for one in found]) == pytest.approx(truth, abs=0.03)
    assert np.mean([one["ece_low"] <= truth <= one["ece_high"] for one in found]) > 0.91


def test_a_model_that_is_always_too_sure_or_too_little_reads_its_gap():
    """A gap beside which chance is nothing: by hand 1 - sigmoid(1), and not an error of 1."""
    found = calibration_error([1.0] * 50)
    gap = 1 - 1 / (1 + math.exp(-1))
    assert found["ece"] == pytest.approx(gap) == found["ece_plugin"]
    assert found["ece_low"] < gap < found["ece_high"] < 0.35
    assert calibration_error([-30.0] * 10)["ece"] == pytest.approx(1.0)


@pytest.mark.parametrize("margins", [[1e-17, -1e-17] * 3, [1e30] * 6])
def test_bins_that_happen_to_be_exact_prove_no_perfect_model(margins: list[float]):
    """Six pairs: three of six right at 1/2, and six of six at 1; a rate of .2 less gives the second in .26 of runs."""
    found = calibration_error(margins)
    assert (found["ece"], found["ece_plugin"], found["ece_low"]) == (0.0, 0.0, 0.0)
    assert found["ece_high"] > 0.3


def test_the_bounds_hold_the_error_whatever_the_pairs():
    generator = np.random.default_rng(3)
    for _ in range(300):
        count, prompts = int(generator.integers(5, 40)), int(generator.integers(5, 12))
        margins = np.round(generator.normal(generator.normal(), 10 ** generator.uniform(-2, 2), count), 2)
        groups = [*range(5), *generator.integers(0, prompts, count - 5).tolist()]
        found = calibration_error(margins, groups, margin_scale=float(generator.choice([0.0, 1e-3, 1.0, 1e3])))
        assert 0.0 <= found["ece_low"] <= found["ece"] <= found["ece_high"] <= 1.0, (margins, groups)


def test_without_margins_there_is_no_error():
    assert calibration_error([]) == dict.fromkeys(("ece", "ece_plugin", "ece_low", "ece_high"))
    assert calibration_bins([]) == []


def test_margins_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match=r"margins\[1\] is nan"):
        calibration_error([1.0, math.nan])
    with pytest.raises(ValueError, match="margin_scale is inf"):
        calibration_error([1.0, 2.0], margin_scale=math.inf)
