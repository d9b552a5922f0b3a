"""Picking among candidates, and how far it moves from the policy."""

import math

import pytest
import torch
from scipy.integrate import quad

from rlhf_core.rollout.best_of_n import kl_bound, num_candidates, pick

SCORES = torch.tensor([[0.1, 0.9, 0.5, 0.3, 0.2, 0.8], [2.0, 1.0, 3.0, -1.0, -3.0, -2.0]])


def test_the_best_of_each_pool_stays() -> None:
    assert pick(SCORES, 3, "best").tolist() == [[1, 5], [2, 3]]
    assert pick(SCORES, 2, "best").tolist() == [[1, 2, 5], [0, 2, 5]]
    assert pick(SCORES, 1, "best").tolist() == [list(range(6))] * 2


def test_contrast_keeps_the_best_and_the_worst_of_the_same_pool() -> None:
    assert pick(SCORES, 3, "contrast").tolist() == [[1, 0, 5, 4], [2, 1, 3, 4]]
    assert pick(SCORES, 6, "contrast").tolist() == [[1, 0], [2, 4]]


def test_equal_scores_still_give_two_candidates() -> None:
    assert pick(torch.zeros(1, 4), 4, "contrast").tolist() == [[0, 3]]
    assert pick(torch.tensor([[1.0, 0.0, 1.0, 0.0]]), 4, "contrast").tolist() == [[0, 3]]


@pytest.mark.parametrize(("of", "keep"), [(4, "best"), (0, "best"), (1, "contrast")])
def test_pools_that_cannot_be_are_refused(of: int, keep: str) -> None:
    with pytest.raises(ValueError, match="pools"):
        pick(SCORES, of, keep)


def test_as_many_candidates_are_sampled_as_picking_takes() -> None:
    assert num_candidates(4, 3, "best") == 12
    assert num_candidates(4, 3, "contrast") == 6
    for kept, of, keep in ((4, 3, "best"), (4, 3, "contrast"), (2, 5, "contrast")):
        assert pick(torch.rand(2, num_candidates(kept, of, keep)), of, keep).shape == (2, kept)


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_the_bound_is_the_divergence_where_no_two_samples_are_equal(n: int) -> None:
    """The quantile of the best of n has density n u^(n-1) where that of one sample is 1."""
    divergence, _ = quad(lambda u: n * u ** (n - 1) * math.log(n * u ** (n - 1)) if u > 0 else 0.0, 0.0, 1.0)
    assert kl_bound(n) == pytest.approx(divergence, abs=1e-6)


def test_the_bound_holds_for_a_policy_of_few_responses() -> None:
    """The best of n among responses with probabilities p, in order of score: (F_i)^n - (F_{i-1})^n."""
    probabilities = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    for n in (2, 4, 16):
        cumulative = probabilities.cumsum(0) ** n
        best = torch.diff(cumulative, prepend=torch.zeros(1, dtype=torch.float64))
        assert (best * (best / probabilities).log()).sum() < kl_bound(n)
