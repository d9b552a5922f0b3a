"""Worked numbers and identities of GAE and of the rewards that go into it. Float64 throughout."""

import pytest
import torch
from torch import Tensor

from rlhf_core.objectives.advantages import explained_variance, gae, penalise_scores, shape_rewards
from rlhf_core.objectives.masked import masked_whiten


def tensor(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_three_tokens_worked_by_hand() -> None:
    """gamma .5, lambda .5, so gamma * lambda = .25.

    delta_3 = 8 - 4 = 4; delta_2 = 0 + .5 * 4 - 2 = 0; delta_1 = 1 + .5 * 2 - 1 = 1
    A_3 = 4; A_2 = 0 + .25 * 4 = 1; A_1 = 1 + .25 * 1 = 1.25
    """
    advantages, returns = gae(
        tensor([1.0, 0.0, 8.0]), tensor([1.0, 2.0, 4.0]), tensor([1.0, 1.0, 1.0]), gamma=0.5, gae_lambda=0.5
    )
    assert advantages.tolist() == [[1.25, 1.0, 4.0]]
    assert returns.tolist() == [[2.25, 3.0, 8.0]]


def test_n21_returns_are_advantages_before_whitening_plus_values() -> None:
    """Rewards 0 0 1, values 0: returns 1/4 1/2 1 with gamma 1/2, lambda 1, whatever whitening makes of advantages."""
    mask = torch.ones(1, 3, dtype=torch.float64)
    advantages, returns = gae(tensor([0.0, 0.0, 1.0]), tensor([0.0, 0.0, 0.0]), mask, gamma=0.5, gae_lambda=1.0)
    assert returns.tolist() == [[0.25, 0.5, 1.0]]
    assert masked_whiten(advantages, mask).mean().item() == pytest.approx(0.0, abs=1e-12)


def test_n17_padding_ends_the_row_with_value_zero() -> None:
    padded = gae(tensor([1.0, 8.0, 50.0]), tensor([1.0, 4.0, 60.0]), tensor([1.0, 1.0, 0.0]), gamma=0.5, gae_lambda=0.5)
    plain = gae(tensor([1.0, 8.0]), tensor([1.0, 4.0]), tensor([1.0, 1.0]), gamma=0.5, gae_lambda=0.5)
    for with_padding, without in zip(padded, plain, strict=True):
        assert with_padding[:, :2].tolist() == without.tolist()
        assert with_padding[:, 2].tolist() == [0.0]


def test_n17_a_response_that_was_cut_goes_on_from_the_value_of_its_last_state() -> None:
    """gamma .5, lambda .5, V after the last token 6: delta_2 = 8 + .5 * 6 - 4 = 7; delta_1 = 1 + .5 * 4 - 1 = 2.

    A_2 = 7; A_1 = 2 + .25 * 7 = 3.75. Padding does not come between the last token and that value.
    """
    rows = tensor([1.0, 8.0, 50.0]), tensor([1.0, 4.0, 60.0]), tensor([1.0, 1.0, 0.0])
    last = torch.tensor([6.0], dtype=torch.float64)
    for width in (2, 3):
        advantages, returns = gae(*(row[:, :width] for row in rows), gamma=0.5, gae_lambda=0.5, last_values_B=last)
        assert advantages[0, :2].tolist() == [3.75, 7.0]
        assert returns[0, :2].tolist() == [4.75, 11.0]


def test_n18_hole_in_the_mask_is_stepped_over() -> None:
    """A masked token between two counted ones takes no discount and passes the later advantage on."""
    holed = gae(tensor([1.0, 99.0, 8.0]), tensor([1.0, 99.0, 4.0]), tensor([1.0, 0.0, 1.0]), gamma=0.5, gae_lambda=0.5)
    plain = gae(tensor([1.0, 8.0]), tensor([1.0, 4.0]), tensor([1.0, 1.0]), gamma=0.5, gae_lambda=0.5)
    for with_hole, without in zip(holed, plain, strict=True):
        assert with_hole[0, [0, 2]].tolist() == without[0].tolist()
        assert with_hole[0, 1].item() == 0.0


@pytest.fixture
def random_case() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    rewards = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    values = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([9, 1, 4, 7, 2, 9])
    mask = (torch.arange(9) < lengths[:, None]).double()
    return rewards, values, mask


def test_lambda_one_is_return_minus_value(random_case: tuple[Tensor, Tensor, Tensor]) -> None:
    rewards, values, mask = random_case
    advantages, returns = gae(rewards, values, mask, gamma=0.9, gae_lambda=1.0)
    expected = torch.zeros_like(rewards)
    for row in range(rewards.shape[0]):
        for t in range(int(mask[row].sum())):
            expected[row, t] = sum(0.9 ** (k - t) * rewards[row, k] for k in range(t, int(mask[row].sum())))
    torch.testing.assert_close(returns, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(advantages, (expected - values) * mask, rtol=0, atol=1e-12)


def test_lambda_zero_is_the_temporal_difference(random_case: tuple[Tensor, Tensor, Tensor]) -> None:
    rewards, values, mask = random_case
    advantages, _ = gae(rewards, values, mask, gamma=0.9, gae_lambda=0.0)
    next_values = torch.cat([(values * mask)[:, 1:], torch.zeros(6, 1, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(advantages, (rewards + 0.9 * next_values - values) * mask, rtol=0, atol=1e-12)


def test_perfect_values_leave_no_advantage() -> None:
    rewards = tensor([0.0, 0.0, 3.0])
    advantages, returns = gae(rewards, tensor([3.0, 3.0, 3.0]), torch.ones_like(rewards), gamma=1.0, gae_lambda=0.95)
    assert advantages.tolist() == [[0.0, 0.0, 0.0]]
    assert returns.tolist() == [[3.0, 3.0, 3.0]]


def test_n15_score_lands_on_the_last_token_and_kl_on_each() -> None:
    rewards = shape_rewards(
        torch.tensor([2.0, -1.0], dtype=torch.float64),
        tensor([0.5, -0.5, 1.0], [1.0, 7.0, 7.0]),
        tensor([1.0, 1.0, 1.0], [1.0, 0.0, 0.0]),
        kl_coef=0.5,
    )
    assert rewards.tolist() == [[-0.25, 0.25, 1.5], [-1.5, 0.0, 0.0]]


def test_a_response_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="without tokens"):
        shape_rewards(torch.ones(1), torch.zeros(1, 3), torch.zeros(1, 3), kl_coef=0.1)


def test_n14_missing_end_is_subtracted_and_then_clipped() -> None:
    scores = penalise_scores(
        torch.tensor([2.0, 2.0, 9.0, -4.5]), torch.tensor([True, False, True, False]), 5.0, missing_end_penalty=1.0
    )
    assert scores.tolist() == [2.0, 1.0, 5.0, -5.0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1.0, 2.0, 3.0], 1.0), ([2.0, 2.0, 2.0], 0.0), ([7.0, 8.0, 9.0], 1.0), ([3.0, 2.0, 1.0], -3.0)],
)
def test_explained_variance(values: list[float], expected: float) -> None:
    """A constant offset does not count against the values; a turned sign costs Var(2x) / Var(x) = 4."""
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    got = explained_variance(tensor([*values, 50.0]), tensor([1.0, 2.0, 3.0, -9.0]), mask)
    assert got.item() == pytest.approx(expected, abs=1e-12)


def test_explained_variance_of_constant_returns_is_zero() -> None:
    ones = torch.ones(2, 3)
    assert explained_variance(torch.randn(2, 3), ones, ones).item() == 0.0
