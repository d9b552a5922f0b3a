"""Importance weights and priorities of replayed rollouts."""

import math

import pytest
import torch

from rlhf_core.objectives.replay import (
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
    assert priority_weights(probabilities, 2, 1.0).tolist() == pytest.approx([0.5, 1.0])
    assert priority_weights(probabilities, 2, 0.0).tolist() == [1.0, 1.0]


def test_extreme_priorities_do_not_overflow() -> None:
    probabilities = priority_probabilities(torch.tensor([1e30, 1e-30]), 3.0)
    assert probabilities.isfinite().all()
    assert probabilities.sum().item() == pytest.approx(1.0)


def test_a_row_that_could_never_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        priority_probabilities(torch.tensor([1.0, 0.0]), 1.0)
