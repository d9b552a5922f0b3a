"""The reward model's card: worked examples, oracles, and figures that are undefined."""

import json
import math

import numpy as np
import pytest
from scipy.stats import kendalltau, spearmanr

from rlhf_core.evaluation.intervals import wilson_interval
from rlhf_core.evaluation.reward_card import calibration_bins, expected_calibration_error, reward_card


def test_a_worked_example():
    card = reward_card([2.0, 1.0, 0.0, 3.0], [1.0, 1.0, 1.0, 0.0], [10, 5, 7, 9], [5, 5, 9, 12])
    assert card["pairwise_accuracy"] == (1 + 0.5 + 0 + 1) / 4
    assert (card["pairwise_accuracy_low"], card["pairwise_accuracy_high"]) == wilson_interval(2.5, 4)
    assert card["longer_accuracy"] == (1 + 0.5 + 0 + 0) / 4
    assert card["num_heldout_pairs"] == 4
    assert card["mean_margin"] == (1 + 0 - 1 + 3) / 4
    # margins 1, 0, -1, 3; differences in length 5, 0, -2, -3
    assert card["length_correlation"] == pytest.approx((5 + 2 - 9) / math.sqrt(11 * 38))


def test_calibration_by_hand():
    margin = math.log(3)  # confidence 3/4
    bins = calibration_bins([margin, margin, margin, -margin, 0.0, 0.0])
    assert [(entry["count"], entry["accuracy"]) for entry in bins] == [(2, 0.5), (4, 0.75)]
    assert [entry["confidence"] for entry in bins] == pytest.approx([0.5, 0.75])
    assert expected_calibration_error(bins) == pytest.approx(0.0)
    overconfident = calibration_bins([margin, -margin])
    assert expected_calibration_error(overconfident) == pytest.approx(0.25)


def test_calibration_error_is_that_of_both_orientations():
    margins = np.random.default_rng(2).normal(0.8, 1.5, 700)
    predicted = np.concatenate([1 / (1 + np.exp(-margins)), 1 / (1 + np.exp(margins))])
    outcome = np.concatenate([np.ones(700), np.zeros(700)])
    place = np.minimum((predicted * 20).astype(int), 19)
    expected = sum(
        abs(predicted[place == index].mean() - outcome[place == index].mean()) * (place == index).mean()
        for index in np.unique(place)
    )
    assert expected_calibration_error(calibration_bins(margins)) == pytest.approx(expected, abs=1e-12)


def test_margins_of_standardised_scores_are_scaled_back():
    margins = np.random.default_rng(0).normal(1.0, 2.0, 500)
    scaled, plain = calibration_bins(margins / 4, margin_scale=4.0), calibration_bins(margins)
    assert [entry["count"] for entry in scaled] == [entry["count"] for entry in plain]
    assert [entry["confidence"] for entry in scaled] == pytest.approx([entry["confidence"] for entry in plain])


def test_a_calibrated_model_has_a_small_error_and_an_inflated_one_a_large():
    generator = np.random.default_rng(9)
    margins = generator.normal(0, 2, 20_000)
    true = np.where(generator.random(20_000) < 1 / (1 + np.exp(-margins)), margins, -margins)
    assert expected_calibration_error(calibration_bins(true)) < 0.01
    assert expected_calibration_error(calibration_bins(true, margin_scale=5.0)) > 0.1


def test_rank_correlations_are_those_of_scipy():
    generator = np.random.default_rng(6)
    grades = generator.integers(0, 6, 300).astype(float)
    scores = grades + generator.normal(0, 2, 300)
    prompts = [row // 5 for row in range(300)]
    card = reward_card([1.0], [0.0], [1], [2], (prompts, grades, scores), seed=3)
    assert card["spearman"] == pytest.approx(spearmanr(grades, scores).statistic)
    assert card["kendall"] == pytest.approx(kendalltau(grades, scores).statistic)
    assert card["spearman_low"] < card["spearman"] < card["spearman_high"]
    within = [spearmanr(grades[i : i + 5], scores[i : i + 5]).statistic for i in range(0, 300, 5)]
    assert card["spearman_within"] == pytest.approx(np.mean(within))
    assert card == reward_card([1.0], [0.0], [1], [2], (prompts, grades, scores), seed=3)


def test_pairs_of_one_prompt_widen_the_interval():
    margins = [1.0] * 60 + [-1.0] * 40
    rows = (margins, [0.0] * 100, [1] * 100, [2] * 100)
    alone, grouped = reward_card(*rows), reward_card(*rows, prompt_ids=[row // 10 for row in range(100)])
    assert grouped["pairwise_accuracy"] == alone["pairwise_accuracy"]
    assert grouped["pairwise_accuracy_low"] < alone["pairwise_accuracy_low"] - 0.05


def test_constant_scores_are_undefined_and_never_nan():
    graded = (["a", "a", "b", "b"], [1.0, 2.0, 1.0, 2.0], [0.0] * 4)
    card = reward_card([0.0, 0.0], [0.0, 0.0], [3, 4], [4, 3], graded)
    assert card["pairwise_accuracy"] == 0.5
    for name in ("spearman", "spearman_low", "spearman_high", "kendall", "spearman_within", "length_correlation"):
        assert card[name] is None
        assert card["undefined"][name]
    assert card["undefined"]["spearman"] == "the model scores are constant"
    json.dumps(card, allow_nan=False)


def test_without_pairs_or_grades_every_figure_says_why():
    card = reward_card([], [], [], [])
    missing = {name for name, value in card.items() if value is None}
    assert missing == set(card["undefined"])
    assert {"pairwise_accuracy", "ece", "spearman"} <= missing
    assert (card["num_heldout_pairs"], card["num_graded"]) == (0, 0)


def test_scores_that_are_not_finite_are_refused_by_place():
    with pytest.raises(ValueError, match=r"rejected_scores\[1\] is nan"):
        reward_card([1.0, 2.0], [0.0, math.nan], [1, 1], [1, 1])


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="differ in number"):
        reward_card([1.0, 2.0], [0.0, 1.0], [1, 1], [1])
