"""Intervals of means over tokens: hand-worked, and what must not change them. How often they hold is in benchmarks."""

import math

import pytest

from rlhf_core.evaluation.intervals import perplexity
from rlhf_core.evaluation.jackknife import ratio_interval


def test_five_prompts_of_one_token_each_by_hand() -> None:
    """Losses 1, 1, 1, 1, 2: the mean is 1.2; without the last 1, without another 1.25. t with 4 degrees is 2.776445."""
    low, high = ratio_interval([1, 1, 1, 1, 2], [1] * 5, "abcde") or (0.0, 0.0)
    error = math.sqrt(4 / 5 * (4 * math.log(1.25 / 1.2) ** 2 + math.log(1 / 1.2) ** 2))
    assert (low, high) == pytest.approx((1.2 * math.exp(-2.776445 * error), 1.2 * math.exp(2.776445 * error)), rel=1e-6)


def test_rows_of_one_prompt_are_one_observation_and_the_unit_does_not_matter() -> None:
    parts, weights = [3.0, 5.0, 2.0, 8.0, 4.0, 6.0], [2.0, 3.0, 2.0, 5.0, 3.0, 4.0]
    whole = ratio_interval(parts, weights, "abcdef")
    halves = ratio_interval([part / 2 for part in parts] * 2, [weight / 2 for weight in weights] * 2, "abcdef" * 2)
    assert halves == pytest.approx(whole)
    scaled = ratio_interval([part * 1000 for part in parts], weights, "abcdef")
    assert scaled == pytest.approx([1000 * end for end in whole or ()])


def test_a_prompt_that_weighs_more_than_the_others_together_leaves_less_to_go_by() -> None:
    """Equal losses but one: of 5 groups with weights 9, 1, 1, 1, 1 there are (13^2 / 85) = 1.99 of equal weight."""
    uneven = ratio_interval([9, 1.2, 1, 1, 1], [9, 1, 1, 1, 1], "abcde")
    assert uneven is not None
    error = math.sqrt(4 / 5 * sum(math.log(left / (13.2 / 13)) ** 2 for left in (4.2 / 4, 1, *[12.2 / 12] * 3)))
    assert math.log(uneven[1] / (13.2 / 13)) == pytest.approx(12.7062 * error, rel=1e-5), "t with 1 degree"


@pytest.mark.parametrize("parts", [[1, 2, 3, 4], [0, 0, 0, 0, 1], []])
def test_too_few_prompts_or_nothing_left_without_one_give_none(parts: list[float]) -> None:
    assert ratio_interval(parts, [1.0] * len(parts), range(len(parts))) is None


def test_losses_that_are_as_large_as_numbers_get_have_ends_too():
    """An end beyond the largest float ends there; it was an OverflowError."""
    found = ratio_interval([1e299, 1e299, 1e299, 1e299, 1e306], [1.0] * 5, range(5))
    assert found is not None
    assert 0.0 < found[0] < 2e305 < found[1] == pytest.approx(1.797e308, rel=1e-3)
    assert (perplexity(0.0), perplexity(709.0), perplexity(710.0)) == (1.0, math.exp(709.0), None)
