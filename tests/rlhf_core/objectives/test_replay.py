"""Importance weights and priorities of replayed rollouts."""

import math

import pytest
import torch

from rlhf_core.objectives.replay import (
    draw_systematically,
    inclusion_probabilities,
    priority_probabilities,
    priority_weights,
    token_importance_weights,
)

MASK = torch.tensor([[1.0, 1.0, 0.0]])


def test_fresh_tokens_weigh_exactly_one() -> None:
    logprobs = torch.randn(1, 3, generator=torch.Generator().manual_seed(0))
    assert token_importance_weights(logprobs, logprobs, MASK, 2.0).tolist() == [[1.0, 1.0, 0.0]]


def test_weights_worked_by_hand_and_truncated() -> None:
    """Ratios 3 and 1/2; 3 is cut to 2."""
    now = torch.tensor([[math.log(3.0), math.log(0.5), 9.0]], requires_grad=True)
    tokens = token_importance_weights(now, torch.zeros(1, 3), MASK, 2.0)
    assert tokens.tolist() == [pytest.approx([2.0, 0.5, 0.0])]
    assert not tokens.requires_grad


def test_truncated_weights_turn_old_samples_into_the_new_expectation() -> None:
    """E_old[w f] = E_new[f] while no ratio reaches the cap: over three outcomes, exactly."""
    old = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    new = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    values = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)
    weights = token_importance_weights(new.log()[None], old.log()[None], torch.ones(1, 3), cap=3.0)[0]
    assert (old * weights * values).sum().item() == pytest.approx((new * values).sum().item(), abs=1e-12)


def test_priorities_worked_by_hand() -> None:
    """Priorities 4 and 1 with exponent .5: 2/3 and 1/3; weights undo it and the largest is 1."""
    probabilities = priority_probabilities(torch.tensor([4.0, 1.0]), 0.5)
    assert probabilities.tolist() == pytest.approx([2 / 3, 1 / 3])
    assert priority_weights(probabilities, 1, 2, 1.0).tolist() == pytest.approx([0.5, 1.0])
    assert priority_weights(probabilities, 1, 2, 0.0).tolist() == [1.0, 1.0]


def test_chances_of_taking_part_worked_by_hand() -> None:
    """Three of four with shares .7, .1, .1, .1: the first for sure, the others 2/3 each."""
    shares = torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=torch.float64)
    assert inclusion_probabilities(shares, 1).tolist() == pytest.approx(shares.tolist())
    assert inclusion_probabilities(shares, 3).tolist() == pytest.approx([1.0, 2 / 3, 2 / 3, 2 / 3])
    assert inclusion_probabilities(shares, 4).tolist() == [1.0] * 4
    with pytest.raises(ValueError, match="5 rows cannot be drawn without replacement from 4"):
        inclusion_probabilities(shares, 5)


def test_rows_beside_which_others_have_no_chance_leave_the_rest_to_all_others_alike() -> None:
    """Priorities 1e33 apart to the power of 20: the chance of 14 is 0, and still eight of 16 are drawn."""
    priorities = torch.tensor([1e30, 1e30, *[1e-3] * 14], dtype=torch.float64)
    inclusion = inclusion_probabilities(priority_probabilities(priorities, 20.0), 8)
    assert inclusion.tolist() == pytest.approx([1.0, 1.0, *[6 / 14] * 14])
    assert len(draw_systematically(inclusion, torch.Generator().manual_seed(0))) == 8


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 0.0])
def test_priorities_that_give_no_chances_are_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="priorities must be positive and finite"):
        priority_probabilities(torch.tensor([1.0, wrong]), 0.6)


@pytest.mark.parametrize("count", [1, 3, 7, 11])
def test_rows_are_drawn_as_often_as_said_and_weights_give_back_the_plain_mean(count: int) -> None:
    """20,000 draws of 12 rows of very different priorities; chances within 4.5 standard errors, never one twice.

    With full correction sum(weight * value) / count, without the division by the largest, estimates the mean over all
    rows (Horvitz and Thompson 1952); weights made for drawing with replacement miss it.
    """
    priorities = torch.tensor([float(2**k) for k in range(12)], dtype=torch.float64)
    inclusion = inclusion_probabilities(priority_probabilities(priorities, 0.6), count)
    generator = torch.Generator().manual_seed(5)
    draws = torch.stack([draw_systematically(inclusion, generator) for _ in range(20_000)])
    assert all(len(set(row)) == count for row in draws[:500].tolist())
    drawn = torch.bincount(draws.flatten(), minlength=12).double() / len(draws)
    error = (inclusion * (1 - inclusion) / len(draws)).sqrt()
    assert bool(((drawn - inclusion).abs() <= 4.5 * error + 1e-12).all())
    estimates = (priorities[draws] / inclusion[draws]).sum(1) / 12
    assert estimates.mean().item() == pytest.approx(
        priorities.mean().item(), abs=4.5 * estimates.std().item() / len(draws) ** 0.5 + 1e-9
    )


def test_a_whole_buffer_that_is_drawn_weighs_one_each() -> None:
    """Weights for drawing with replacement would give rows that are sure to take part up to one part in eight."""
    inclusion = inclusion_probabilities(priority_probabilities(torch.arange(1.0, 33.0).double(), 0.6), 32)
    chosen = draw_systematically(inclusion, torch.Generator().manual_seed(0))
    assert sorted(chosen.tolist()) == list(range(32))
    assert priority_weights(inclusion[chosen], 32, 32, 0.4).tolist() == [1.0] * 32


def test_extreme_priorities_do_not_overflow() -> None:
    probabilities = priority_probabilities(torch.tensor([1e30, 1e-30]), 3.0)
    assert probabilities.isfinite().all()
    assert probabilities.sum().item() == pytest.approx(1.0)


def test_a_row_that_could_never_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        priority_probabilities(torch.tensor([1.0, 0.0]), 1.0)
