"""KTO on single responses: worked numbers, its reference point, and which way it pushes."""

import math

import pytest
import torch
from torch import Tensor

from rlhf_core.objectives.unpaired import kto_baseline, kto_losses


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def test_worked_by_hand() -> None:
    """beta .5, baseline 1: log-ratio 3 liked gives 1 - sigmoid(1); log-ratio -1 disliked gives 1 - sigmoid(1)."""
    losses, stats = kto_losses(
        vector(-2.0, -6.0), vector(-5.0, -5.0), torch.tensor([True, False]), torch.tensor(1.0), 0.5, 1.1, 2.3
    )
    expected = [1.1 * (1 - sigmoid(1.0)), 2.3 * (1 - sigmoid(1.0))]
    assert losses.tolist() == pytest.approx(expected, rel=1e-14)
    assert stats["implicit_reward/each"].tolist() == [1.5, -0.5]


def test_liked_rise_and_disliked_fall() -> None:
    policy = vector(-3.0, -3.0).requires_grad_()
    losses, _ = kto_losses(policy, vector(-3.0, -3.0), torch.tensor([1.0, 0.0]), torch.tensor(0.0), 0.1)
    losses.sum().backward()
    assert policy.grad.tolist() == [pytest.approx(-0.025), pytest.approx(0.025)]


def test_a_response_far_below_the_baseline_keeps_a_loss_of_all_digits() -> None:
    """1 - sigmoid(40) rounds to 0 in float32; sigmoid(-40) does not."""
    losses, _ = kto_losses(torch.tensor([40.0]), torch.zeros(1), torch.tensor([True]), torch.tensor(0.0), 1.0)
    assert losses.item() == pytest.approx(math.exp(-40.0), rel=1e-5, abs=0.0)


def test_baseline_is_a_mean_that_is_never_negative_and_carries_no_gradient() -> None:
    policy = vector(-1.0, -2.0, -3.0).requires_grad_()
    assert kto_baseline(policy, vector(-2.0, -2.0, -3.5)).item() == pytest.approx(0.5)
    assert kto_baseline(policy, vector(0.0, 0.0, 0.0)).item() == 0.0
    assert not kto_baseline(policy, vector(-2.0, -2.0, -3.5)).requires_grad


def test_baseline_of_two_processes_is_clamped_after_the_sum() -> None:
    """Log-ratios (-3, -1) here and (7) there: mean 1. Clamped here first it would be 7/3."""
    there = iter([1.0, 7.0])
    here = vector(-3.0, -1.0)
    assert kto_baseline(here, torch.zeros_like(here), lambda mine: mine + next(there)).item() == pytest.approx(1.0)
