"""Advantages without a value model, worked by hand, and the two properties that name them."""

import math

import pytest
import torch
from torch import Tensor

from rlhf_core.objectives.baselines import (
    group_relative_advantages,
    leave_one_out_advantages,
    over_tokens,
    reinforce_advantages,
)

GROUPS = torch.tensor([4, 9, 4, 9, 4])  # rows of a prompt need not stand together


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_reinforce_subtracts_its_baseline() -> None:
    assert reinforce_advantages(vector(3.0, 1.0), 2.0).tolist() == [1.0, -1.0]


def test_leave_one_out_worked_by_hand() -> None:
    """Prompt 4 earned 1, 2, 6: 1 - 4, 2 - 3.5, 6 - 1.5. Prompt 9 earned 5 and 3."""
    advantages = leave_one_out_advantages(vector(1.0, 5.0, 2.0, 3.0, 6.0), GROUPS)
    assert advantages.tolist() == pytest.approx([-3.0, 2.0, -1.5, -2.0, 4.5], abs=1e-12)


def test_leave_one_out_keeps_its_digits_at_a_high_common_level() -> None:
    """Plain sums would lose them: float32 has steps of 0.06 at a million."""
    totals = torch.tensor([1e6, 1e6 + 1, 1e6 + 2])
    assert leave_one_out_advantages(totals, torch.zeros(3)).tolist() == pytest.approx([-1.5, 0.0, 1.5], abs=1e-6)


def test_group_relative_worked_by_hand() -> None:
    """Prompt 4: mean 3, deviation with n - 1 sqrt((4 + 1 + 9) / 2) = sqrt 7; prompt 9: mean 4, sqrt 2."""
    advantages = group_relative_advantages(vector(1.0, 5.0, 2.0, 3.0, 6.0), GROUPS, eps=0.0)
    expected = [-2 / math.sqrt(7), 1 / math.sqrt(2), -1 / math.sqrt(7), -1 / math.sqrt(2), 3 / math.sqrt(7)]
    assert advantages.tolist() == pytest.approx(expected, abs=1e-12)


def test_responses_that_earn_the_same_teach_nothing() -> None:
    same = torch.full((5,), 0.1)
    assert group_relative_advantages(same, GROUPS).abs().max().item() < 1e-3
    assert leave_one_out_advantages(vector(2.0, 7.0, 2.0, 7.0, 2.0), GROUPS).abs().max().item() == 0.0


@pytest.mark.parametrize("function", [leave_one_out_advantages, group_relative_advantages])
def test_a_prompt_with_one_response_is_refused_by_name(function: object) -> None:
    assert callable(function)
    with pytest.raises(ValueError, match=r"\[9\].*two or more"):
        function(vector(1.0, 2.0, 3.0), torch.tensor([4, 9, 4]))


def test_every_token_carries_its_responses_advantage() -> None:
    spread = over_tokens(vector(2.0, -1.0), torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
    assert spread.tolist() == [[2.0, 2.0, 0.0], [-1.0, 0.0, 0.0]]


def test_totals_that_are_equal_teach_exactly_nothing_whatever_their_size() -> None:
    """Seven times 1000.1 in float32 over seven is another number: .14 under GRPO, and after whitening all of it."""
    for level in (0.1, 1000.1, 123456.7):
        totals, group = torch.full((7,), level), torch.zeros(7)
        assert group_relative_advantages(totals, group).tolist() == [0.0] * 7
        assert leave_one_out_advantages(totals, group).tolist() == [0.0] * 7
        assert leave_one_out_advantages(totals, group).dtype == torch.float32


def test_what_rounding_does_to_large_equal_totals_is_no_difference() -> None:
    """Float32 numbers near 1e6 lie 1/16 apart: one of nine that is the next number earned the same."""
    totals = torch.tensor([1e6, 1e6 + 0.0625, 1e6] * 3)
    assert totals[1] != totals[0]
    assert group_relative_advantages(totals, torch.zeros(9)).abs().max() < 0.05
    real = torch.tensor([1e6, 1e6 + 100.0, 1e6] * 3)
    assert group_relative_advantages(real, torch.zeros(9))[1].item() == pytest.approx(4 / 3**0.5 / 1.5**0.5, rel=0.4)
