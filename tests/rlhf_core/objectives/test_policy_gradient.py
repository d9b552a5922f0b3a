"""PPO's losses: hand-worked numbers, the band's edges, the direction of every gradient."""

import math

import pytest
import torch
from torch import Tensor

from rlhf_core.objectives.policy_gradient import entropy_losses, ppo_policy_losses, value_losses

EPS = 0.2


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def test_n04_ratio_one_gives_minus_the_advantage() -> None:
    logprobs = row(-1.0, -2.0, -3.0)
    losses, stats = ppo_policy_losses(logprobs, logprobs, row(1.0, -4.0, 6.0), row(1, 1, 1), EPS)
    assert losses.tolist() == [[-1.0, 4.0, -6.0]]
    assert {key: value.tolist() for key, value in stats.items()} == {
        "policy/approx_kl": [[0.0, 0.0, 0.0]],
        "policy/clip_fraction": [[0.0, 0.0, 0.0]],
        "policy/ratio": [[1.0, 1.0, 1.0]],
    }


def test_three_tokens_worked_by_hand() -> None:
    """Ratios 1.5, .5 and 1.1 with advantages 2, -1 and 3, one masked token beside them.

    min(3, 1.2 * 2) = 2.4; min(-.5, .8 * -1) = -.8; min(3.3, 3.3) = 3.3.
    KL(old || new), k3 = ratio - 1 - log ratio.
    """
    ratios = [1.5, 0.5, 1.1]
    logprobs = row(*[math.log(ratio) for ratio in ratios], 9.0)
    losses, stats = ppo_policy_losses(logprobs, row(0, 0, 0, 0), row(2.0, -1.0, 3.0, 100.0), row(1, 1, 1, 0), EPS)
    assert losses[0].tolist() == pytest.approx([-2.4, 0.8, -3.3, 0.0], abs=1e-12)
    assert stats["policy/clip_fraction"].tolist() == [[1.0, 1.0, 0.0, 0.0]]
    assert stats["policy/ratio"][0].tolist() == pytest.approx([*ratios, 0.0])
    expected_kl = [ratio - 1 - math.log(ratio) for ratio in ratios]
    assert stats["policy/approx_kl"][0].tolist() == pytest.approx([*expected_kl, 0.0], abs=1e-12)


def test_n25_micro_batches_add_up_to_the_batch() -> None:
    """Rows of 3, 1 and 2 tokens: sums over the common total are one loss, means of means another."""
    generator = torch.Generator().manual_seed(4)
    logprobs, advantages = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64).unbind()
    mask = torch.tensor([[1.0, 1, 1], [1, 0, 0], [1, 1, 0]], dtype=torch.float64)
    old = torch.zeros_like(logprobs)
    whole, _ = ppo_policy_losses(logprobs, old, advantages, mask, EPS)
    parts = [ppo_policy_losses(*[x[i : i + 1] for x in (logprobs, old, advantages, mask)], EPS)[0] for i in range(3)]
    total = mask.sum()
    assert sum((part.sum() / total).item() for part in parts) == pytest.approx((whole.sum() / total).item(), abs=1e-14)
    means = [part.sum() / mask[i].sum() for i, part in enumerate(parts)]
    assert abs(torch.stack(means).mean().item() - (whole.sum() / total).item()) > 0.01


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
    losses, _ = ppo_policy_losses(logprobs, row(0.0), row(advantage), row(1), EPS)
    losses.sum().backward()
    expected = -advantage * math.exp(log_ratio) if has_gradient else 0.0
    assert logprobs.grad.item() == pytest.approx(expected, abs=1e-12)


def test_positive_advantage_raises_the_log_probability() -> None:
    logprobs = row(-1.0, -1.0).requires_grad_()
    losses, _ = ppo_policy_losses(logprobs, row(-1.0, -1.0), row(1.0, -1.0), row(1, 1), EPS)
    losses.sum().backward()
    assert logprobs.grad[0, 0].item() < 0 < logprobs.grad[0, 1].item()


def test_n06_enormous_log_ratio_stays_finite() -> None:
    logprobs = torch.tensor([[500.0, -500.0]], requires_grad=True)
    losses, stats = ppo_policy_losses(logprobs, torch.zeros(1, 2), torch.tensor([[-1.0, 1.0]]), torch.ones(1, 2), EPS)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert losses[0, 0].item() == pytest.approx(math.exp(20.0), rel=1e-6)
    assert all(value.isfinite().all() for value in stats.values())
    assert logprobs.grad.isfinite().all()


def test_n22_value_losses_worked_by_hand() -> None:
    """Old value 0, clip .5: V 2 to G 3 is held at .5 -> 2.5^2; V .25 is free -> 2.75^2; V 2 to G 0 is free -> 4."""
    losses, stats = value_losses(row(2.0, 0.25, 2.0), row(0, 0, 0), row(3.0, 3.0, 0.0), row(1, 1, 1), 0.5)
    assert losses[0].tolist() == pytest.approx([3.125, 3.78125, 2.0], abs=1e-12)
    assert stats["loss/value_clip_fraction"].tolist() == [[1.0, 0.0, 0.0]]


def test_values_inside_the_clip_are_not_counted_as_clipped() -> None:
    """Old value plus difference is not the new value but for rounding: without a look at eps some counted."""
    generator = torch.Generator().manual_seed(0)
    old, new, returns = (0.1 * torch.rand(1, 1000, generator=generator) for _ in range(3))
    _, stats = value_losses(new, old, returns, torch.ones(1, 1000), 0.2)
    assert not stats["loss/value_clip_fraction"].any()


def test_value_gradient_points_at_the_return_and_ends_beyond_the_clip() -> None:
    values = row(0.25, 2.0, -0.25).requires_grad_()
    losses, _ = value_losses(values, row(0, 0, 0), row(3.0, 3.0, -3.0), row(1, 1, 1), 0.5)
    losses.sum().backward()
    assert values.grad.tolist() == [[pytest.approx(-2.75), 0.0, pytest.approx(2.75)]]


def test_fresh_tokens_have_the_gradient_of_reinforce() -> None:
    """At ratio 1 it is -A d log pi (Williams 1992), which is why the methods without a value model share this loss."""
    logprobs = row(-1.0, -2.0, -3.0).requires_grad_()
    losses, _ = ppo_policy_losses(logprobs, logprobs.detach(), row(2.0, -1.0, 100.0), row(1, 1, 0), EPS)
    losses.sum().backward()
    assert logprobs.grad.tolist() == [[-2.0, 1.0, 0.0]]


def test_entropy_is_paid_back() -> None:
    assert entropy_losses(row(0.5, 1.5, 9.0), row(1, 1, 0)).tolist() == [[-0.5, -1.5, 0.0]]
