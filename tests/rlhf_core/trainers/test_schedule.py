"""Learning rates at the steps where a schedule shows its shape."""

import math
from itertools import pairwise

import pytest

from rlhf_core.trainers.schedule import learning_rate


def test_warm_up_is_a_line_that_begins_above_zero() -> None:
    rates = [learning_rate(step, 100, 2.0, 4, 0.1, "cosine") for step in range(5)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_it_falls_from_the_peak_to_the_share_at_the_last_step(shape: str) -> None:
    rates = [learning_rate(step, 101, 1.0, 0, 0.2, shape) for step in range(101)]
    assert rates[0] == 1.0
    assert rates[50] == pytest.approx(0.6)
    assert rates[100] == pytest.approx(0.2)
    assert all(later < earlier for earlier, later in pairwise(rates))


def test_the_shapes_differ_as_they_should() -> None:
    assert learning_rate(25, 101, 1.0, 0, 0.0, "linear") == pytest.approx(0.75)
    assert learning_rate(25, 101, 1.0, 0, 0.0, "cosine") == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_short_and_overlong_runs_stay_in_bounds() -> None:
    assert learning_rate(0, 1, 1.0, 0, 0.1, "linear") == 1.0
    assert learning_rate(2, 3, 1.0, 5, 0.1, "linear") == pytest.approx(0.6)
    assert learning_rate(50, 10, 1.0, 2, 0.1, "cosine") == pytest.approx(0.1)
