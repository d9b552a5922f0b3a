"""Gaussian scores, distilled labels and the contrastive term, against SciPy and by hand."""

import math

import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from rlhf_core.objectives.uncertainty import (
    contrastive_losses,
    distilled_pair_losses,
    distilled_score_losses,
    ensemble_preference,
    gaussian_pair_losses,
)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("delta", [-200.0, -30.0, -1.0, 0.0, 2.0, 40.0])
def test_gaussian_pairs_are_scipys_normal_distribution(delta: float) -> None:
    """Phi(-100) is 1e-2174, far below what a number format holds; its logarithm is exact all the same."""
    mean = vector(delta).requires_grad_()
    losses = gaussian_pair_losses(mean, vector(0.0), vector(1.5), vector(2.5))
    assert losses.item() == pytest.approx(-stats.norm.logcdf(delta / 2.0), rel=1e-9, abs=1e-15)
    losses.sum().backward()
    slope = -math.exp(stats.norm.logpdf(delta / 2.0) - stats.norm.logcdf(delta / 2.0)) / 2.0
    assert mean.grad.item() == pytest.approx(slope, rel=1e-9, abs=1e-15)


def test_wrong_pairs_raise_the_variance_and_right_pairs_lower_it() -> None:
    variance = vector(1.0, 1.0).requires_grad_()
    gaussian_pair_losses(vector(-1.0, 1.0), vector(0.0, 0.0), variance, vector(1.0, 1.0)).sum().backward()
    assert variance.grad[0].item() < 0 < variance.grad[1].item()


def test_a_variance_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="variances must be positive"):
        gaussian_pair_losses(vector(1.0), vector(0.0), vector(0.0), vector(0.0))


@pytest.mark.parametrize(("mean", "variance"), [(0.0, 4.0), (1.0, 0.0), (2.0, 1.0), (-1.5, 9.0)])
def test_ensemble_preference_is_close_to_the_exact_expectation(mean: float, variance: float) -> None:
    if variance:
        exact, _ = integrate.quad(
            lambda x: stats.norm.pdf(x, mean, math.sqrt(variance)) / (1 + math.exp(-x)), mean - 30, mean + 30
        )
    else:
        exact = 1 / (1 + math.exp(-mean))
    assert ensemble_preference(vector(mean), vector(variance)).item() == pytest.approx(exact, abs=0.012)


def test_distilled_pairs_are_lowest_at_the_teachers_probability() -> None:
    """sigmoid(ln 3) = 3/4; the loss there is the entropy of (3/4, 1/4)."""
    first = vector(math.log(3.0)).requires_grad_()
    losses = distilled_pair_losses(first, vector(0.0), vector(0.75))
    losses.sum().backward()
    assert first.grad.item() == pytest.approx(0.0, abs=1e-15)
    assert losses.item() == pytest.approx(stats.entropy([0.75, 0.25]), abs=1e-12)


def test_n39_distilled_pairs_take_their_difference_in_float32() -> None:
    """Both scores are exact in bfloat16, their difference -100.1875 is not: it would round to -100."""
    narrow = distilled_pair_losses(
        torch.tensor([0.3125]).bfloat16(), torch.tensor([100.5]).bfloat16(), torch.tensor([1.0])
    )
    assert narrow.item() == 100.1875


def test_distilled_scores_are_squared_distances() -> None:
    assert distilled_score_losses(vector(1.0, -2.0), vector(3.0, -2.0)).tolist() == [4.0, 0.0]


def test_contrastive_worked_by_hand() -> None:
    """Anchor along x, positive alike (1) and at right angles (0), negatives at .6 and -1, the last not allowed."""
    anchors = torch.tensor([[2.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    positives = torch.tensor([[5.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    negatives = torch.tensor([[3.0, 4.0], [-1.0, 0.0]], dtype=torch.float64)
    allowed = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    losses = contrastive_losses(anchors, positives, negatives, allowed, temperature=0.5)
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-0.8)), 0.0], abs=1e-12)


def test_contrastive_draws_to_the_positive_and_away_from_the_negative() -> None:
    anchors = torch.tensor([[1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    losses = contrastive_losses(
        anchors,
        torch.tensor([[1.0, 0.0]], dtype=torch.float64),
        torch.tensor([[0.0, 1.0]], dtype=torch.float64),
        torch.ones(1, 1),
        temperature=0.1,
    )
    losses.sum().backward()
    assert anchors.grad[0, 0].item() < 0 < anchors.grad[0, 1].item()
