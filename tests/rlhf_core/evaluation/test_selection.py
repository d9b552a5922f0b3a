"""Picking the best of several, and trying again: how often nothing passes for something."""

import math

import numpy as np
import pytest

from rlhf_core.evaluation.ab import summarise
from rlhf_core.evaluation.intervals import win_rate_interval
from rlhf_core.evaluation.selection import confidence_of_attempt, confidence_of_each


def outcomes(generator: np.random.Generator, prompts: int, tie: float = 0.2) -> list[str]:
    """Of a candidate that is as good as what it is held against."""
    chances = [(1 - tie) / 2, tie, (1 - tie) / 2]
    return generator.choice(["win", "tie", "loss"], size=prompts, p=chances).tolist()


@pytest.mark.parametrize("prompts", [24, 300])
def test_the_best_of_five_equals_passes_for_better_as_seldom_as_one(prompts: int) -> None:
    """Without the correction one run in eight has one; half of the error is on the side that passes."""
    generator, passed, naive, runs = np.random.default_rng(2), 0, 0, 1500
    for _ in range(runs):
        five = [outcomes(generator, prompts) for _ in range(5)]
        best = max(five, key=lambda one: one.count("win") - one.count("loss"))
        passed += summarise(best, candidates=5)["win_rate_low"] > 0.5
        naive += summarise(best)["win_rate_low"] > 0.5
    assert passed / runs <= 0.03
    assert naive / runs > 0.08


def test_p_value_and_interval_of_several_candidates_say_the_same() -> None:
    rows = ["win"] * 60 + ["tie"] * 10 + ["loss"] * 38
    alone, of_four = summarise(rows), summarise(rows, candidates=4)
    assert of_four["p_value"] == pytest.approx(4 * alone["p_value"])
    assert (of_four["win_rate_low"], of_four["win_rate_high"]) == win_rate_interval(60, 10, 38, 0.9875)
    assert summarise(["win", "loss"] * 5, candidates=9)["p_value"] == 1.0


def test_the_error_of_any_number_of_attempts_adds_up_to_the_whole() -> None:
    spent = [1 - confidence_of_attempt(0.95, attempt) for attempt in range(1, 20_000)]
    assert sum(spent) == pytest.approx(0.05, abs=1e-5)
    assert spent[:3] == pytest.approx([0.05 * 6 / math.pi**2 / k**2 for k in (1, 2, 3)])
    assert confidence_of_each(0.95, 1) == 0.95
    with pytest.raises(ValueError, match="counted from 1"):
        confidence_of_attempt(0.95, 0)
    with pytest.raises(ValueError, match="no choice"):
        confidence_of_each(0.95, 0)
