"""PPO's losses: hand-worked numbers, the band's edges, the direction of every gradient."""

import math

import pytest
import torch
from torch import Tensor

from rlhf_core.objectives.policy_gradient import ppo_policy_loss, value_loss

EPS = 0.2


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def test_ratio_one_gives_minus_the_mean_advantage() -> None:
    logprobs = row(-1.0, -2.0, -3.0)
    loss, stats = ppo_policy_loss(logprobs, logprobs, row(1.0, -4.0, 6.0), row(1, 1, 1), EPS)
    assert loss.item() == -1.0
    assert {key: value.item() for key, value in stats.items()} == {
        "policy/approx_kl": 0.0,
        "policy/clip_fraction": 0.0,
        "policy/ratio_max": 1.0,
    }


def test_three_tokens_worked_by_hand() -> None:
    """Ratios 1.5, .5 and 1.1 with advantages 2, -1 and 3, one masked token beside them.

    min(3, 1.2 * 2) = 2.4; min(-.5, .8 * -1) = -.8; min(3.3, 3.3) = 3.3; mean 4.9 / 3.
    KL(old || new), k3 = ratio - 1 - log ratio.
    """
    ratios = [1.5, 0.5, 1.1]
    logprobs = row(*[math.log(ratio) for ratio in ratios], 9.0)
    loss, stats = ppo_policy_loss(logprobs, row(0, 0, 0, 0), row(2.0, -1.0, 3.0, 100.0), row(1, 1, 1, 0), EPS)
    assert loss.item() == pytest.approx(-4.9 / 3, abs=1e-12)
    assert stats["policy/clip_fraction"].item() == pytest.approx(2 / 3)
    assert stats["policy/ratio_max"].item() == pytest.approx(1.5)
    expected_kl = sum(ratio - 1 - math.log(ratio) for ratio in ratios) / 3
    assert stats["policy/approx_kl"].item() == pytest.approx(expected_kl, abs=1e-12)


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "has_gradient"),
    [
        (math.log(1.19), 1.0, True),
        (math.log(1.21), 1.0, False),
        (math.log(0.81), -1.0, True),
        (math.log(0.79), -1.0, False),
        (math.log(1.21), -1.0, True),
        (math.log(0.79), 1.0, True),
    ],
)
def test_the_band_stops_a_token_only_on_its_way_out(log_ratio: float, advantage: float, has_gradient: bool) -> None:
    logprobs = row(log_ratio).requires_grad_()
    loss, _ = ppo_policy_loss(logprobs, row(0.0), row(advantage), row(1), EPS)
    loss.backward()
    expected = -advantage * math.exp(log_ratio) if has_gradient else 0.0
    assert logprobs.grad.item() == pytest.approx(expected, abs=1e-12)


def test_positive_advantage_raises_the_log_probability() -> None:
    logprobs = row(-1.0, -1.0).requires_grad_()
    loss, _ = ppo_policy_loss(logprobs, row(-1.0, -1.0), row(1.0, -1.0), row(1, 1), EPS)
    loss.backward()
    assert logprobs.grad[0, 0].item() < 0 < logprobs.grad[0, 1].item()


def test_enormous_log_ratio_stays_finite() -> None:
    logprobs = torch.tensor([[500.0, -500.0]], requires_grad=True)
    loss, stats = ppo_policy_loss(logprobs, torch.zeros(1, 2), torch.tensor([[-1.0, 1.0]]), torch.ones(1, 2), EPS)
    loss.backward()
    assert loss.isfinite()
    assert all(value.isfinite() for value in stats.values())
    assert logprobs.grad.isfinite().all()


def test_value_loss_worked_by_hand() -> None:
    """Old value 0, clip .5: V 2 to G 3 is held at .5 -> 2.5^2; V .25 is free -> 2.75^2; V 2 to G 0 is free -> 4.

    Half the mean of 6.25, 7.5625 and 4.
    """
    loss, stats = value_loss(row(2.0, 0.25, 2.0), row(0, 0, 0), row(3.0, 3.0, 0.0), row(1, 1, 1), 0.5)
    assert loss.item() == pytest.approx(0.5 * (6.25 + 7.5625 + 4.0) / 3, abs=1e-12)
    assert stats["loss/value_clip_fraction"].item() == pytest.approx(1 / 3)


def test_value_gradient_points_at_the_return_and_ends_beyond_the_clip() -> None:
    values = row(0.25, 2.0, -0.25).requires_grad_()
    loss, _ = value_loss(values, row(0, 0, 0), row(3.0, 3.0, -3.0), row(1, 1, 1), 0.5)
    loss.backward()
    assert values.grad.tolist() == [[pytest.approx(-2.75 / 3), 0.0, pytest.approx(2.75 / 3)]]
