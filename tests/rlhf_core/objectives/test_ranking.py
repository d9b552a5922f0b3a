"""Comparisons and rankings: closed forms, probabilities that sum to one, weights, levels."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from rlhf_core.objectives.ranking import (
    all_pairs_weights,
    bradley_terry_losses,
    centering_losses,
    level_losses,
    margin_losses,
    plackett_luce_losses,
    tie_losses,
)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_n39_bradley_terry_worked_by_hand_with_ties_of_scores_as_half() -> None:
    """Margins 1, -1 and 0: log(1 + 1/e), log(1 + e) and ln 2."""
    losses, stats = bradley_terry_losses(vector(2.0, 0.0, 3.0), vector(1.0, 1.0, 3.0))
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-1.0)), math.log1p(math.e), math.log(2.0)], abs=1e-15)
    assert stats["reward/accuracy"].tolist() == [1.0, 0.0, 0.5]
    assert stats["reward/margin"].tolist() == [1.0, -1.0, 0.0]


def test_n39_differences_of_scores_are_taken_in_float32() -> None:
    """Both scores are exact in bfloat16, their difference -100.1875 is not: it would round to -100."""
    chosen, rejected = torch.tensor([0.3125]), torch.tensor([100.5])
    for function in (bradley_terry_losses, lambda a, b: margin_losses(a, b, 1.0)):
        exact, _ = function(chosen, rejected)
        narrow, _ = function(chosen.bfloat16(), rejected.bfloat16())
        assert narrow.dtype == torch.float32
        assert narrow.item() == exact.item()


def test_margin_asks_for_more() -> None:
    """-log sigmoid(delta - m), the sense of Llama 2; the statistics do not see the margin."""
    losses, stats = bradley_terry_losses(vector(2.0), vector(1.0), vector(3.0))
    assert losses.item() == pytest.approx(math.log1p(math.exp(2.0)), abs=1e-15)
    assert stats["reward/accuracy"].item() == 1.0


def test_hinge_margin_worked_by_hand() -> None:
    losses, _ = margin_losses(vector(2.0, 5.0, 0.0), vector(1.0, 1.0, 1.0), vector(3.0, 3.0, 3.0))
    assert losses.tolist() == [2.0, 0.0, 4.0]


def test_bradley_terry_raises_the_chosen_and_lowers_the_rejected() -> None:
    chosen, rejected = vector(0.0).requires_grad_(), vector(0.0).requires_grad_()
    bradley_terry_losses(chosen, rejected)[0].sum().backward()
    assert (chosen.grad.item(), rejected.grad.item()) == (-0.5, 0.5)


@pytest.mark.parametrize("delta", [-2000.0, 2000.0])
def test_n38_extreme_differences_stay_finite(delta: float) -> None:
    first = torch.tensor([delta], requires_grad=True)
    losses = bradley_terry_losses(first, torch.zeros(1))[0] + tie_losses(first, torch.zeros(1), 0.1)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert first.grad.isfinite().all()


@pytest.mark.parametrize("delta", [-4.0, -0.3, 0.0, 1.0, 30.0])
@pytest.mark.parametrize("threshold", [0.05, 0.5, 2.0])
def test_first_second_and_tie_are_one_distribution(delta: float, threshold: float) -> None:
    a, b = vector(delta), vector(0.0)
    nll = [
        bradley_terry_losses(a, b, threshold)[0],
        bradley_terry_losses(b, a, threshold)[0],
        tie_losses(a, b, threshold),
    ]
    assert sum(math.exp(-loss.item()) for loss in nll) == pytest.approx(1.0, abs=1e-12)


def test_a_tie_draws_scores_together_from_either_side() -> None:
    scores = vector(1.0, -1.0).requires_grad_()
    tie_losses(scores, torch.zeros(2, dtype=torch.float64), 0.5).sum().backward()
    assert scores.grad[0].item() > 0 > scores.grad[1].item()
    assert scores.grad[0].item() == pytest.approx(-scores.grad[1].item())


@pytest.mark.parametrize("threshold", [1e-9, 0.5, 354.0, 355.0, 1e6])
def test_a_tie_has_a_loss_and_a_gradient_at_any_threshold(threshold: float) -> None:
    """exp(2 * 355) does not fit into a number, the loss does: 45 nats for scores 45 further apart than that."""
    scores = (vector(0.0, threshold + 45.0)).requires_grad_()
    losses = tie_losses(scores, torch.zeros(2, dtype=torch.float64), threshold)
    nothing_seen = 2 * math.log1p(math.exp(-threshold)) - math.log(-math.expm1(-2 * threshold))
    assert losses[0].item() == pytest.approx(nothing_seen, rel=1e-12)
    above = math.log1p(math.exp(-45.0 - 2 * threshold)) - math.log(-math.expm1(-2 * threshold))
    assert losses[1].item() == pytest.approx(45.0 + above, rel=1e-12)
    losses.sum().backward()
    assert scores.grad.tolist() == pytest.approx([0.0, 1.0], abs=1e-9)


def test_ties_without_a_threshold_are_refused() -> None:
    with pytest.raises(ValueError, match="threshold"):
        tie_losses(vector(1.0), vector(1.0), 0.0)


def test_every_ranking_weighs_the_same_in_the_average_of_all_pairs() -> None:
    """Three pairs of ranking 7 and one of ranking 2."""
    weights = all_pairs_weights(torch.tensor([7, 2, 7, 7]))
    assert weights.tolist() == pytest.approx([1 / 3, 1.0, 1 / 3, 1 / 3])


def test_plackett_luce_of_two_is_bradley_terry() -> None:
    scores = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        plackett_luce_losses(scores, torch.ones(5, 2)), bradley_terry_losses(scores[:, 0], scores[:, 1])[0]
    )


def test_plackett_luce_is_a_distribution_over_orders() -> None:
    scores = torch.tensor([0.3, -1.2, 2.0, 0.0], dtype=torch.float64)
    orders = torch.tensor(list(itertools.permutations(range(4))))
    probabilities = (-plackett_luce_losses(scores[orders], torch.ones(24, 4))).exp()
    assert probabilities.sum().item() == pytest.approx(1.0, abs=1e-12)
    assert orders[probabilities.argmax()].tolist() == [2, 0, 3, 1]


def test_plackett_luce_worked_by_hand_with_a_short_ranking() -> None:
    """Weights 4, 2, 2: 4/8 * 2/4; the second ranking has two places, 3/4 of weights 3 and 1."""
    scores = torch.tensor([[4.0, 2.0, 2.0], [3.0, 1.0, 1.0]], dtype=torch.float64).log()
    scores[1, 2] = math.nan
    scores.requires_grad_()
    losses = plackett_luce_losses(scores, torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]))
    assert losses.tolist() == pytest.approx([math.log(4.0), math.log(4 / 3)], abs=1e-12)
    losses.sum().backward()
    assert scores.grad.isfinite().all()
    assert scores.grad[1, 2].item() == 0.0
    torch.testing.assert_close(scores.grad.sum(1), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_place_left_out_is_as_if_it_were_not_there() -> None:
    scores = torch.tensor([[1.0, 9.0, -0.5]], dtype=torch.float64)
    holed = plackett_luce_losses(scores, torch.tensor([[1.0, 0.0, 1.0]]))
    assert holed.item() == pytest.approx(plackett_luce_losses(scores[:, [0, 2]], torch.ones(1, 2)).item(), abs=1e-15)


def test_centering_leaves_the_difference_free_and_the_level_term_does_not() -> None:
    chosen, rejected = vector(3.0, 3.0), vector(-3.0, 1.0)
    assert centering_losses(chosen, rejected).tolist() == [0.0, 16.0]
    assert level_losses(chosen).tolist() == [9.0, 9.0]
