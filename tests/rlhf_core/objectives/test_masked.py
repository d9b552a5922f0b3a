"""Masked statistics against the same statistics of the counted tokens alone, and blindness to what is masked."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_core.objectives import advantages, baselines, kl, masked, policy_gradient, preference, ranking, replay

B, R = 3, 5
MASK = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0, 0.0]])


def test_statistics_equal_those_of_the_counted_tokens() -> None:
    values = torch.randn(B, R, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = MASK.double()
    counted = values[mask == 1]
    mean, variance = masked.masked_moments(values, mask)
    torch.testing.assert_close(mean, counted.mean())
    torch.testing.assert_close(variance, counted.var(correction=0))
    torch.testing.assert_close(masked.masked_sum(values, mask)[2], values[2, 0] + values[2, 2])
    whitened = masked.masked_whiten(values, mask)
    assert whitened[mask == 1].mean().item() == pytest.approx(0.0, abs=1e-12)
    assert whitened[mask == 1].var(correction=0).item() == pytest.approx(1.0, abs=1e-7)
    assert whitened[mask == 0].abs().max().item() == 0.0


def test_tokens_weigh_the_same_in_long_and_short_rows() -> None:
    values = torch.tensor([[1.0, 1.0, 1.0], [5.0, 0.0, 0.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    assert masked.masked_moments(values, mask)[0].item() == 2.0


def test_whitening_equal_tokens_gives_zeros() -> None:
    assert masked.masked_whiten(torch.full((B, R), 3.0), MASK).abs().max().item() == 0.0


@pytest.mark.parametrize("value", [0.1, 1e-3, 1000.1, -3e7])
@pytest.mark.parametrize("count", [3, 1000, 4097])
def test_whitening_numbers_that_differ_by_rounding_gives_no_signal(value: float, count: int) -> None:
    """Equal numbers, and numbers one unit in the last place apart: zeros, or next to it, whatever their size."""
    equal = torch.full((1, count), value)
    assert masked.masked_whiten(equal, torch.ones(1, count)).abs().max().item() < 1e-3
    apart = torch.where(torch.arange(count) % 2 == 0, equal, torch.nextafter(equal, torch.tensor(torch.inf)))
    assert masked.masked_whiten(apart, torch.ones(1, count)).abs().max().item() < 0.05


def test_whitening_small_but_real_differences_keeps_them() -> None:
    values = 1000.0 + torch.linspace(-0.5, 0.5, 101)[None]
    whitened = masked.masked_whiten(values, torch.ones(1, 101))
    assert whitened.std(correction=0).item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("value", [0.1, 1000.1])
@pytest.mark.parametrize("width", [torch.float32, torch.float64])
def test_equal_returns_leave_nothing_to_explain(value: float, width: torch.dtype) -> None:
    """A thousand returns of 0.1 had an explained variance of -1.9e16: their mean is rounded, and off all of them."""
    returns, values = torch.full((10, 100), value, dtype=width), torch.randn(10, 100).to(width)
    assert advantages.explained_variance(values, returns, torch.ones(10, 100)).item() == 0.0
    apart = torch.where(torch.arange(100) % 2 == 0, returns, torch.nextafter(returns, returns + 1))
    assert advantages.explained_variance(values, apart, torch.ones(10, 100)).item() == 0.0


@pytest.mark.parametrize("function", [masked.masked_moments, masked.masked_whiten])
def test_empty_mask_has_no_mean(function: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match="zero everywhere"):
        function(torch.ones(2, 2), torch.zeros(2, 2))


def test_n19_whitening_takes_all_tokens_of_all_processes() -> None:
    """Row 0 here, rows 1 and 2 in another process: with the sums of both, row 0 comes out as in one process."""
    values = torch.randn(B, R, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mask = MASK.double()
    alone = masked.masked_whiten(values, mask)
    counted = values[mask == 1]
    sums = iter([mask.sum(), counted.sum(), (counted - counted.mean()).square().sum()])
    shared = masked.masked_whiten(values[:1], mask[:1], across=lambda _: next(sums))
    torch.testing.assert_close(shared, alone[:1], rtol=0, atol=1e-14)
    by_itself = masked.masked_whiten(values[:1], mask[:1])
    assert (by_itself - alone[:1]).abs().max().item() > 0.1


def _gae(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return advantages.gae(rewards, values, MASK, gamma=0.9, gae_lambda=0.8)


SCORES = torch.tensor([1.0, -2.0, 0.5])
FUNCTIONS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "masked_sum": lambda x, y: masked.masked_sum(x + y, MASK),
    "masked_moments": lambda x, y: masked.masked_moments(x + y, MASK),
    "masked_whiten": lambda x, y: masked.masked_whiten(x + y, MASK),
    "gae": _gae,
    "shape_rewards": lambda x, y: advantages.shape_rewards(SCORES, x + y, MASK, kl_coef=0.3),
    "explained_variance": lambda x, y: advantages.explained_variance(x, y, MASK),
    "kl_k1": lambda x, y: kl.kl_k1(x, y, MASK),
    "kl_k3": lambda x, y: kl.kl_k3(x, y, MASK),
    "kl_to_reference": lambda x, y: kl.kl_to_reference(x, y, MASK),
    "kl_k2": lambda x, y: kl.kl_k2(x, y, MASK),
    "over_tokens": lambda x, y: baselines.over_tokens(masked.masked_sum(x + y, MASK), MASK),
    "policy, logprobs": lambda x, y: policy_gradient.ppo_policy_losses(x, y, torch.ones(B, R), MASK, 0.2),
    "policy, advantages": lambda x, y: policy_gradient.ppo_policy_losses(x, torch.zeros(B, R), y, MASK, 0.2),
    "value, values": lambda x, y: policy_gradient.value_losses(x, y, torch.ones(B, R), MASK, 0.2),
    "value, returns": lambda x, y: policy_gradient.value_losses(x, torch.zeros(B, R), y, MASK, 0.2),
    "entropy": lambda x, y: policy_gradient.entropy_losses(x + y, MASK),
    "token weights": lambda x, y: replay.token_importance_weights(x, y, MASK, 2.0),
    "nll": lambda x, y: preference.nll_losses(x + y, MASK),
    "plackett_luce": lambda x, y: ranking.plackett_luce_losses(x + y, MASK),
}


def flat(result: object) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, dict):
        return list(result.values())
    assert isinstance(result, tuple)
    return [tensor for part in result for tensor in flat(part)]


@pytest.mark.parametrize("name", FUNCTIONS)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rubbish=st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=2 * B * R, max_size=2 * B * R),
)
def test_what_is_masked_moves_nothing(name: str, seed: int, rubbish: list[float]) -> None:
    """Values and gradients stay the same to the bit, NaN and infinity under the mask included."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randn(2, B, R, generator=generator)
    dirty = torch.where(MASK == 1, clean, torch.tensor(rubbish).view(2, B, R))
    results, gradients = [], []
    for inputs in (clean, dirty):
        inputs = inputs.clone().requires_grad_()
        outputs = flat(FUNCTIONS[name](inputs[0], inputs[1]))
        results.append([tensor.detach() for tensor in outputs])
        differentiable = [tensor.sum() for tensor in outputs if tensor.requires_grad]
        if differentiable:
            sum(differentiable).backward()
        gradients.append(torch.zeros_like(inputs) if inputs.grad is None else inputs.grad)
    for first, second in zip(*results, strict=True):
        assert first.isfinite().all()
        assert torch.equal(first, second)
    assert torch.equal(gradients[0][:, MASK == 1], gradients[1][:, MASK == 1])
    assert gradients[1][:, MASK == 0].abs().max().item() == 0.0
