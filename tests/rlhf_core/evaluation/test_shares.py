"""Shares of several policies: all candidates, the choice among them, and what a mixture of three makes of tokens."""

import math
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from rlhf_core.evaluation.shares import best_parts, likelihood_to_gain, mixture_likelihood, part_lattice


@pytest.fixture(scope="module")
def logprobs_MT() -> torch.Tensor:
    """Three members that are each the best of some tokens."""
    generator = torch.Generator().manual_seed(5)
    means = torch.tensor([[-1.0], [-1.03], [-1.06]]).double()
    return means - torch.randn(3, 400, generator=generator, dtype=torch.float64).abs()


@pytest.mark.parametrize(("num_members", "parts"), [(2, 2), (2, 4), (3, 3), (3, 4), (3, 7), (4, 9)])
def test_the_lattice_holds_every_way_to_deal_the_parts_once(num_members: int, parts: int) -> None:
    brute = [deal for deal in product(range(1, parts + 1), repeat=num_members) if sum(deal) == parts]
    lattice = part_lattice(num_members, parts)
    assert lattice == sorted(brute, reverse=True)
    assert len(lattice) == math.comb(parts - 1, num_members - 1)
    assert {sum(Fraction(part, parts) for part in deal) for deal in lattice} == {1}


def test_four_parts_are_the_quarters_of_two_members_in_order_of_the_second() -> None:
    assert [deal[1] / 4 for deal in part_lattice(2, 4)] == [0.25, 0.5, 0.75]


def test_of_equal_values_the_most_even_shares_are_taken_then_the_first() -> None:
    lattice = part_lattice(3, 6)
    assert lattice[best_parts(lattice, [0.5] * len(lattice))] == (2, 2, 2)
    assert lattice[best_parts(lattice, [0.5 + 1e-12 * place for place in range(len(lattice))])] == (2, 2, 2)
    uneven = part_lattice(3, 4)
    assert uneven[best_parts(uneven, [-1.0] * 3)] == (2, 1, 1)
    assert uneven[best_parts(uneven, [-1.0, -1.0, -1.0 + 1e-6])] == (1, 1, 2)


def test_a_mixture_of_three_by_hand() -> None:
    """Two tokens, written out; a share of 0 leaves its member out, 1 leaves it alone."""
    table = torch.tensor([[0.5, 0.1], [0.25, 0.8], [0.125, 0.2]], dtype=torch.float64).log()
    first, second = 0.2 * 0.5 + 0.3 * 0.25 + 0.5 * 0.125, 0.2 * 0.1 + 0.3 * 0.8 + 0.5 * 0.2
    shares = (0.2, 0.3, 0.5)
    assert mixture_likelihood(table, shares) == pytest.approx((math.log(first) + math.log(second)) / 2, abs=1e-14)
    gains = [(one / first + two / second) / 2 - 1 for one, two in [(0.5, 0.1), (0.25, 0.8), (0.125, 0.2)]]
    assert likelihood_to_gain(table, shares) == pytest.approx(max(gains), abs=1e-14)
    without = (math.log(0.4 * 0.5 + 0.6 * 0.125) + math.log(0.4 * 0.1 + 0.6 * 0.2)) / 2
    assert mixture_likelihood(table, (0.4, 0.0, 0.6)) == pytest.approx(without, abs=1e-14)
    assert mixture_likelihood(table, (0.0, 1.0, 0.0)) == table[1].mean().item()


def test_no_shares_do_better_than_the_bound_and_the_lattice_comes_near_it(logprobs_MT: torch.Tensor) -> None:
    """Against SciPy's constrained maximum and against EM, whose fixed point has nothing to gain."""
    table = logprobs_MT.numpy()

    def loss(shares: Any) -> float:
        return -float(np.log(shares @ np.exp(table)).mean())

    found = minimize(
        loss,
        np.full(3, 1 / 3),
        method="SLSQP",
        bounds=[(1e-9, 1)] * 3,
        constraints={"type": "eq", "fun": lambda shares: shares.sum() - 1},
        options={"ftol": 1e-14},
    )
    assert found.success
    lattice = part_lattice(3, 20)
    values = [mixture_likelihood(logprobs_MT, [part / 20 for part in deal]) for deal in lattice]
    brute = [-loss(np.array(deal) / 20) for deal in lattice]
    assert values == pytest.approx(brute, abs=1e-12)
    best = best_parts(lattice, values)
    assert best == int(np.argmax(brute))
    assert np.abs(np.array(lattice[best]) / 20 - found.x).max() < 0.05
    assert values[best] < -found.fun < values[best] + 1e-3
    for deal, value in zip(lattice, values, strict=True):
        assert -found.fun <= value + likelihood_to_gain(logprobs_MT, [part / 20 for part in deal])

    shares = torch.full((3,), 1 / 3).double()
    for _ in range(3000):
        mixed_T = torch.logsumexp(logprobs_MT + shares.log()[:, None], 0)
        shares = shares * (logprobs_MT - mixed_T).exp().mean(1)
    assert shares.numpy() == pytest.approx(found.x, abs=1e-4)
    assert likelihood_to_gain(logprobs_MT, shares.tolist()) == pytest.approx(0.0, abs=1e-6)
    assert mixture_likelihood(logprobs_MT, shares.tolist()) == pytest.approx(-found.fun, abs=1e-9)
