"""The reward model's card: worked examples, oracles, and figures that are undefined."""

import json
import math

import numpy as np
import pytest
from scipy.stats import kendalltau, spearmanr

from rlhf_core.evaluation.intervals import mean_interval, wilson_interval
from rlhf_core.evaluation.reward_card import ScoredPairs, reward_card


def test_a_worked_example():
    card = reward_card(ScoredPairs([2.0, 1.0, 0.0, 3.0], [1.0, 1.0, 1.0, 0.0], [10, 5, 7, 9], [5, 5, 9, 12]))
    assert card["pairwise_accuracy"] == (1 + 0.5 + 0 + 1) / 4
    assert (card["pairwise_accuracy_low"], card["pairwise_accuracy_high"]) == (None, None)
    assert card["undefined"]["pairwise_accuracy_low"] == "too few prompts: 4, an interval needs 5"
    assert card["longer_accuracy"] == (1 + 0.5 + 0 + 0) / 4
    assert card["num_heldout_pairs"] == 4
    assert card["mean_margin"] == (1 + 0 - 1 + 3) / 4
    # margins 1, 0, -1, 3; differences in length 5, 0, -2, -3
    assert card["length_correlation"] == pytest.approx((5 + 2 - 9) / math.sqrt(11 * 38))


def test_rank_correlations_are_those_of_scipy():
    generator = np.random.default_rng(6)
    grades = generator.integers(0, 6, 300).astype(float)
    scores = grades + generator.normal(0, 2, 300)
    prompts = [row // 5 for row in range(300)]
    card = reward_card(ScoredPairs([1.0], [0.0], [1], [2]), (prompts, grades, scores))
    assert card["spearman"] == pytest.approx(spearmanr(grades, scores).statistic)
    assert card["kendall"] == pytest.approx(kendalltau(grades, scores).statistic)
    for name in ("spearman", "kendall"):
        assert card[f"{name}_low"] < card[name] < card[f"{name}_high"]
    within = [spearmanr(grades[i : i + 5], scores[i : i + 5]).statistic for i in range(0, 300, 5)]
    assert card["spearman_within"] == pytest.approx(np.mean(within))
    low, high = mean_interval(within)
    assert (card["spearman_within_low"], card["spearman_within_high"]) == pytest.approx((low, high))
    assert card == reward_card(ScoredPairs([1.0], [0.0], [1], [2]), (prompts, grades, scores))


def test_without_prompts_each_pair_is_one():
    card = reward_card(ScoredPairs([1.0, 1.0, 0.0, 3.0, 1.0], [0.0, 1.0, 1.0, 0.0, 0.0], [1] * 5, [1] * 5))
    assert (card["pairwise_accuracy_low"], card["pairwise_accuracy_high"]) == wilson_interval(3.5, 5)


def test_four_prompts_are_too_few_for_any_interval_and_five_are_enough():
    generator = np.random.default_rng(3)
    for prompts in (4, 5):
        groups = np.repeat(np.arange(prompts), 6).tolist()
        grades = generator.integers(0, 4, len(groups)).astype(float)
        scores = grades + generator.normal(size=len(groups))
        pairs = (generator.normal(0.5, 1, len(groups)), [0.0] * len(groups), [1] * len(groups), [2] * len(groups))
        card = reward_card(ScoredPairs(*pairs, groups), (groups, grades, scores))
        ends = {name for name in card if name.endswith(("_low", "_high"))}
        assert len(ends) == 12
        assert {name for name in ends if card[name] is None} == (ends if prompts == 4 else set())
        assert set(card["undefined"]) - {"length_correlation"} == (ends if prompts == 4 else set())


def test_pairs_of_one_prompt_widen_the_interval():
    margins = [1.0] * 60 + [-1.0] * 40
    rows = (margins, [0.0] * 100, [1] * 100, [2] * 100)
    alone, grouped = (reward_card(ScoredPairs(*rows, ids)) for ids in (None, [row // 10 for row in range(100)]))
    assert grouped["pairwise_accuracy"] == alone["pairwise_accuracy"]
    assert grouped["pairwise_accuracy_low"] < alone["pairwise_accuracy_low"] - 0.05


def test_constant_scores_are_undefined_and_never_nan():
    graded = (["a", "a", "b", "b"], [1.0, 2.0, 1.0, 2.0], [0.0] * 4)
    card = reward_card(ScoredPairs([0.0, 0.0], [0.0, 0.0], [3, 4], [4, 3]), graded)
    assert card["pairwise_accuracy"] == 0.5
    for name in ("spearman", "spearman_low", "spearman_high", "kendall", "spearman_within", "length_correlation"):
        assert card[name] is None
        assert card["undefined"][name]
    assert card["undefined"]["spearman"] == "the model scores are constant"
    json.dumps(card, allow_nan=False)


def test_without_pairs_or_grades_every_figure_says_why():
    card = reward_card(ScoredPairs([], [], [], []))
    missing = {name for name, value in card.items() if value is None}
    assert missing == set(card["undefined"])
    assert {"pairwise_accuracy", "ece", "spearman"} <= missing
    assert (card["num_heldout_pairs"], card["num_graded"]) == (0, 0)


def test_scores_that_are_not_finite_are_refused_by_place():
    with pytest.raises(ValueError, match=r"rejected_scores\[1\] is nan"):
        reward_card(ScoredPairs([1.0, 2.0], [0.0, math.nan], [1, 1], [1, 1]))


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="differ in number"):
        ScoredPairs([1.0, 2.0], [0.0, 1.0], [1, 1], [1])
