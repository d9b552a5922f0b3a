"""DPO and Bradley-Terry: closed-form numbers, extremes and gradient signs."""

import math

import pytest
import torch
from torch import Tensor

from rlhf_core.objectives.preference import chosen_nll, dpo_loss
from rlhf_core.objectives.ranking import bradley_terry_loss, centering_loss


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_dpo_of_a_policy_equal_to_its_reference_is_ln_2() -> None:
    chosen, rejected = vector(-5.0, -7.0), vector(-6.0, -2.0)
    loss, stats = dpo_loss(chosen, rejected, chosen, rejected, beta=0.1)
    assert loss.item() == math.log(2.0)
    assert stats["reward/accuracy"].item() == 0.5
    assert stats["reward/margin"].item() == 0.0


def test_dpo_worked_by_hand() -> None:
    """beta .5: implicit rewards .5 * (2) = 1 and .5 * (-1) = -.5, margin 1.5."""
    loss, stats = dpo_loss(vector(-3.0), vector(-5.0), vector(-5.0), vector(-4.0), beta=0.5)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1.5)), abs=1e-12)
    assert stats["reward/chosen"].item() == 1.0
    assert stats["reward/rejected"].item() == -0.5
    assert stats["reward/margin"].item() == 1.5
    assert stats["reward/accuracy"].item() == 1.0


def test_dpo_raises_the_chosen_and_lowers_the_rejected() -> None:
    chosen, rejected = vector(-3.0).requires_grad_(), vector(-3.0).requires_grad_()
    loss, _ = dpo_loss(chosen, rejected, vector(-3.0), vector(-3.0), beta=0.1)
    loss.backward()
    assert chosen.grad.item() == pytest.approx(-0.05)
    assert rejected.grad.item() == pytest.approx(0.05)


def test_dpo_pulls_harder_with_a_larger_beta() -> None:
    losses = [dpo_loss(vector(-2.0), vector(-4.0), vector(-3.0), vector(-3.0), beta)[0].item() for beta in (0.1, 1.0)]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("margin", [-2000.0, 2000.0])
def test_extreme_margins_stay_finite(margin: float) -> None:
    chosen = torch.tensor([margin], requires_grad=True)
    dpo, _ = dpo_loss(chosen, torch.zeros(1), torch.zeros(1), torch.zeros(1), beta=1.0)
    ranking, _ = bradley_terry_loss(chosen, torch.zeros(1))
    (dpo + ranking).backward()
    assert dpo.item() == ranking.item() == max(0.0, -margin)
    assert chosen.grad.isfinite().all()


def test_chosen_nll_is_a_mean_over_tokens_of_the_batch() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-6.0, 50.0, 50.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    assert chosen_nll(logprobs, mask).item() == 3.0


def test_bradley_terry_worked_by_hand() -> None:
    """Margins 1, -1 and 0: log(1 + e^-1), log(1 + e) and ln 2; the tie counts half."""
    loss, stats = bradley_terry_loss(vector(2.0, 0.0, 3.0), vector(1.0, 1.0, 3.0))
    expected = (math.log1p(math.exp(-1.0)) + math.log1p(math.e) + math.log(2.0)) / 3
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert stats["reward/accuracy"].item() == 0.5
    assert stats["reward/margin"].item() == 0.0


def test_bradley_terry_raises_the_chosen_and_lowers_the_rejected() -> None:
    chosen, rejected = vector(0.0).requires_grad_(), vector(0.0).requires_grad_()
    bradley_terry_loss(chosen, rejected)[0].backward()
    assert chosen.grad.item() == -0.5
    assert rejected.grad.item() == 0.5


def test_bradley_terry_takes_the_difference_in_float32() -> None:
    """In bfloat16 the loss of margin 1/64 rounds to that of a tie or worse; the scores themselves are exact there."""
    chosen, rejected = torch.tensor([1.015625]), torch.tensor([1.0])
    exact, _ = bradley_terry_loss(chosen, rejected)
    narrow, _ = bradley_terry_loss(chosen.bfloat16(), rejected.bfloat16())
    assert narrow.dtype == torch.float32
    assert narrow.item() == exact.item()


def test_centering_is_the_mean_square() -> None:
    assert centering_loss(vector(1.0, -3.0)).item() == 5.0
