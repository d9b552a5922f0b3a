"""Comparisons of two response sets: counting, ties, both orders."""

import pytest

from rlhf_core.evaluation.ab import both_orders, compare_scores, summarise


def longer(prompts, first, second):
    return [
        "first" if len(a) > len(b) else "second" if len(b) > len(a) else "tie"
        for a, b in zip(first, second, strict=True)
    ]


def test_scores_by_hand():
    result = compare_scores([3, 2, 1, 5, 5, 5], [1, 2, 4, 1, 1, 1])
    assert (result["wins"], result["ties"], result["losses"], result["num_prompts"]) == (4, 1, 1, 6)
    assert result["win_rate"] == 4.5 / 6
    assert result["p_value"] == pytest.approx(2 * (1 + 5) / 32)
    assert result["win_rate_low"] < 4.5 / 6 < result["win_rate_high"]


def test_a_difference_within_the_tolerance_is_a_tie():
    assert compare_scores([0.1 + 0.2], [0.3])["ties"] == 1
    assert compare_scores([1.0], [1.4], tolerance=0.5)["ties"] == 1
    assert compare_scores([1.0], [1.6], tolerance=0.5)["losses"] == 1


def test_swapping_the_sides_mirrors_the_result():
    one, other = compare_scores([1, 2, 3, 9, 8], [2, 2, 1, 1, 1]), compare_scores([2, 2, 1, 1, 1], [1, 2, 3, 9, 8])
    assert (one["wins"], one["losses"]) == (other["losses"], other["wins"])
    assert one["win_rate"] == 1 - other["win_rate"]
    assert one["win_rate_low"] == pytest.approx(1 - other["win_rate_high"])
    assert one["p_value"] == other["p_value"]


def test_a_wider_confidence_gives_a_wider_interval():
    narrow, wide = (compare_scores([1, 1, 0, 1, 1], [0, 0, 1, 0, 0], confidence) for confidence in (0.8, 0.99))
    assert wide["win_rate_low"] < narrow["win_rate_low"] < narrow["win_rate_high"] < wide["win_rate_high"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(bad: float):
    with pytest.raises(ValueError, match="row 1"):
        compare_scores([1.0, bad], [1.0, 2.0])


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="2 scores for A, 1 for B"):
        compare_scores([1.0, 2.0], [1.0])


def test_nothing_compared_is_undefined():
    result = summarise([])
    assert result["num_prompts"] == 0
    assert result["win_rate"] is None
    assert result["p_value"] is None


def test_an_unknown_outcome_is_refused():
    with pytest.raises(ValueError, match="'draw'"):
        summarise(["win", "draw"])


def test_a_judge_without_bias_says_the_same_in_both_orders():
    verdicts = both_orders(longer, ["p"] * 3, ["aaa", "a", "aa"], ["b", "bbb", "bb"])
    assert verdicts == (["win", "loss", "tie"], 1.0, [1.0, 0.0, 0.5])


def test_a_judge_of_the_place_gets_only_ties():
    def always_first(prompts, first, second):
        return ["first"] * len(prompts)

    verdicts = both_orders(always_first, ["p"] * 4, ["a"] * 4, ["b"] * 4)
    assert verdicts == (["tie"] * 4, 0.0, [0.5] * 4)


def test_a_judge_biased_by_place_keeps_only_what_both_orders_say():
    def lenient(prompts, first, second):
        return ["second" if len(b) > len(a) + 1 else "first" for a, b in zip(first, second, strict=True)]

    verdicts = both_orders(lenient, ["p"] * 3, ["aaaa", "a", "aa"], ["b", "bbbb", "b"])
    assert verdicts.outcomes == ["win", "loss", "tie"]
    assert verdicts.consistency == pytest.approx(2 / 3)


@pytest.mark.parametrize("answers", [["first"], ["first", "left"]])
def test_a_judge_that_does_not_answer_is_refused(answers: list[str]):
    with pytest.raises(ValueError, match="must answer"):
        both_orders(lambda prompts, first, second: answers, ["p", "q"], ["a", "b"], ["c", "d"])


@pytest.mark.parametrize("answers", [[0.5, 1.5], [float("nan"), 0.0], [-0.1, 0.3]])
def test_a_number_that_is_no_probability_is_refused(answers: list[float]):
    with pytest.raises(ValueError, match="a probability"):
        both_orders(lambda prompts, first, second: answers, ["p", "q"], ["a", "b"], ["c", "d"])


def test_probabilities_are_read_in_both_orders_by_hand():
    """Of a, b, c, d against x: P(shown first is better), with a liking of 0.1 for the first place."""
    liking = {"a": 0.8, "b": 0.2, "c": 0.55, "d": 0.5}

    def judge(prompts, first, second):
        return [liking[a] + 0.1 if a in liking else 1.0 - liking[b] + 0.1 for a, b in zip(first, second, strict=True)]

    rows = ["p"] * 4, list("abcd"), ["x"] * 4
    verdicts = both_orders(judge, *rows)
    assert verdicts.outcomes == ["win", "loss", "tie", "tie"]  # c: 0.65 shown first, 0.45 shown second
    assert verdicts.consistency == 0.5
    assert verdicts.shares == pytest.approx([0.8, 0.2, 0.55, 0.5])
    lenient = both_orders(judge, *rows, tie_within=0.16)
    assert (lenient.outcomes, lenient.consistency) == (["win", "loss", "tie", "tie"], 1.0)
