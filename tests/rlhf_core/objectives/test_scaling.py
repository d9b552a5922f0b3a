"""Running moments and quantiles against NumPy, and that JSON keeps them to the bit."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.objectives.scaling import Moments, normalise_scores, scale_by_quantiles, score_quantiles

LOTS = st.lists(st.lists(st.floats(-1e6, 1e6), max_size=6), min_size=1, max_size=5)


@given(lots=LOTS)
@settings(max_examples=60, deadline=None)
def test_lots_merged_in_turn_have_the_moments_of_all_numbers(lots: list[list[float]]) -> None:
    merged = Moments()
    for lot in lots:
        merged = merged.merged(Moments.of(torch.tensor(lot, dtype=torch.float64)))
    numbers = np.concatenate([np.array(lot, dtype=np.float64) for lot in lots])
    assert merged.count == len(numbers)
    if len(numbers):
        scale = max(1.0, np.abs(numbers).max())
        assert merged.mean == pytest.approx(numbers.mean(), abs=1e-12 * scale)
        assert merged.variance == pytest.approx(numbers.var(), abs=1e-10 * scale**2)
    else:
        assert merged.variance == 0.0


def test_variance_survives_a_large_mean() -> None:
    """The mean of squares less the squared mean gives 0 or worse here, even in float64."""
    lot = torch.tensor([1e9 + 1, 1e9 + 2, 1e9 + 3], dtype=torch.float64)
    halves = Moments.of(lot[:1]).merged(Moments.of(lot[1:]))
    assert halves.variance == pytest.approx(2 / 3, rel=1e-6)


def test_n41_running_moments_pass_through_json_to_the_bit() -> None:
    moments = Moments.of(torch.randn(17, generator=torch.Generator().manual_seed(0))).merged(
        Moments.of(torch.tensor([0.1, 0.7]))
    )
    assert Moments(**json.loads(json.dumps(asdict(moments)))) == moments


def test_two_processes_see_the_moments_of_both() -> None:
    first, second = torch.tensor([1.0, 2.0]), torch.tensor([6.0])
    both = torch.cat([first, second]).double()
    sums = iter([torch.tensor(3.0).double(), both.sum(), (both - both.mean()).square().sum()])
    moments = Moments.of(first, lambda _: next(sums))
    assert (moments.count, moments.mean, moments.variance) == pytest.approx((3.0, 3.0, 14.0 / 3.0))


def test_scores_become_standard_scores() -> None:
    moments = Moments(count=4.0, mean=10.0, squares=16.0)  # standard deviation 2
    assert normalise_scores(torch.tensor([0.0, 10.0, 14.0]), moments).tolist() == pytest.approx([-5.0, 0.0, 2.0])


def test_scores_that_never_varied_stay_finite() -> None:
    assert normalise_scores(torch.tensor([3.0]), Moments(count=2.0, mean=3.0, squares=0.0)).tolist() == [0.0]


def test_quantiles_are_numpys() -> None:
    scores = torch.randn(37, generator=torch.Generator().manual_seed(4))
    expected = np.quantile(scores.double().numpy(), [0.05, 0.95])
    assert score_quantiles(scores, 0.05, 0.95) == pytest.approx(tuple(expected), abs=1e-15)


def test_quantiles_stand_at_minus_one_and_one() -> None:
    scaled = scale_by_quantiles(torch.tensor([2.0, 4.0, 6.0, 100.0]), 2.0, 6.0)
    assert scaled.tolist() == [-1.0, 0.0, 1.0, 48.0]


@pytest.mark.parametrize(("low", "high"), [(2.0, 2.0), (2.0, 1.0), (0.5, 0.5 + 1e-6), (-1e-6, 0.0), (3e7, 3e7 + 8.0)])
def test_quantiles_that_do_not_rise_by_more_than_rounding_are_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="do not rise"):
        scale_by_quantiles(torch.tensor([1.0]), low, high)


def test_scores_of_one_size_that_differ_by_rounding_do_not_become_standard_scores() -> None:
    """Two neighbours in float32 at 10,000 are 1e-3 apart, which is more than the 1e-4 beside the deviation."""
    scores = torch.tensor([1e4, 1e4 + 1e-3]).repeat(50).double()
    assert scores.std().item() > 4e-4
    assert normalise_scores(scores, Moments.of(scores)).abs().max().item() < 0.05
    apart = torch.linspace(1e4 - 1, 1e4 + 1, 101, dtype=torch.float64)
    assert normalise_scores(apart, Moments.of(apart)).std(correction=0).item() == pytest.approx(1.0, abs=1e-3)
