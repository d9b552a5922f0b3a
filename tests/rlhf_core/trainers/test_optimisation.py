"""The shared optimiser step: clipped by norm, never taken on numbers that are not finite."""

import math

import pytest
import torch
from torch import nn

from rlhf_core.errors import Diverged
from rlhf_core.state.train_state import TrainState
from rlhf_core.trainers import optimisation
from rlhf_core.trainers.optimisation import (
    apply_gradients,
    make_optimizer,
    refused_steps,
    set_learning_rate,
    sum_gradients,
)


def make_state(rate: float = 0.1) -> TrainState:
    torch.manual_seed(0)
    module = nn.Linear(2, 1)
    return TrainState(modules={"policy": module}, optimizers={"policy": torch.optim.SGD(module.parameters(), lr=rate)})


def give_gradient(state: TrainState, weight: list[float], bias: float) -> None:
    module = state.modules["policy"]
    module.weight.grad, module.bias.grad = torch.tensor([weight]), torch.tensor([bias])


def test_a_large_gradient_is_scaled_to_the_norm_and_a_small_one_is_not() -> None:
    for norm, scale in ((1.0, 1 / 13), (13.0, 1.0), (100.0, 1.0)):
        state = make_state()
        before = state.modules["policy"].weight.detach().clone()
        give_gradient(state, [3.0, 4.0], 12.0)  # norm 13
        assert apply_gradients(state, "policy", 0.5, norm) == pytest.approx(13.0)
        moved = before - state.modules["policy"].weight.detach()
        torch.testing.assert_close(moved, 0.1 * scale * torch.tensor([[3.0, 4.0]]))
        assert state.modules["policy"].weight.grad is None


@pytest.mark.parametrize(("loss", "gradient"), [(math.nan, 1.0), (math.inf, 1.0), (0.5, math.nan), (0.5, math.inf)])
def test_a_step_that_is_not_finite_changes_nothing(loss: float, gradient: float) -> None:
    state = make_state()
    state.optimizers["policy"] = make_optimizer(state.modules["policy"], 0.1)
    give_gradient(state, [1.0, 1.0], 1.0)
    apply_gradients(state, "policy", 0.5, 1.0)
    weights = {key: value.clone() for key, value in state.modules["policy"].state_dict().items()}
    moments = [entry["exp_avg"].clone() for entry in state.optimizers["policy"].state.values()]
    give_gradient(state, [gradient, 0.0], 0.0)
    assert apply_gradients(state, "policy", loss, 1.0) is None
    assert all(torch.equal(value, weights[key]) for key, value in state.modules["policy"].state_dict().items())
    for entry, before in zip(state.optimizers["policy"].state.values(), moments, strict=True):
        assert torch.equal(entry["exp_avg"], before)
    assert state.modules["policy"].weight.grad is None


@pytest.mark.parametrize("size", [1e18, 3e19, 3e38])
def test_a_gradient_whose_square_overflows_is_scaled_as_any_other(size: float) -> None:
    """Entries that are numbers give a norm that is one: only the sum of their squares does not fit into float32."""
    state = make_state()
    before = state.modules["policy"].weight.detach().clone()
    give_gradient(state, [0.6 * size, 0.0], 0.8 * size)
    assert apply_gradients(state, "policy", 0.5, 10.0) == pytest.approx(size, rel=1e-6)
    moved = before - state.modules["policy"].weight.detach()
    torch.testing.assert_close(moved, torch.tensor([[0.6, 0.0]]))
    assert state.extra == {"refused_in_a_row/policy": 0}


def test_three_refusals_in_a_row_end_training_and_a_good_step_forgives() -> None:
    state = make_state()
    state.step = 41

    def attempt(loss: float) -> None:
        give_gradient(state, [1.0, 0.0], 0.0)
        apply_gradients(state, "policy", loss, 1.0)

    for loss in (math.nan, math.nan, 0.5, math.nan, math.nan):
        attempt(loss)
    with pytest.raises(Diverged, match=r"policy: step 42: loss nan .* 3 times in a row"):
        attempt(math.nan)


def test_refusals_survive_a_checkpoint() -> None:
    """The count lives in `extra`, so a run that is killed on the way to divergence does not start counting again."""
    state = make_state()
    give_gradient(state, [1.0, 0.0], 0.0)
    apply_gradients(state, "policy", math.nan, 1.0)
    assert state.extra == {"refused_in_a_row/policy": 1, "refused/policy": 1}
    assert refused_steps(state) == 1


def test_matrices_decay_and_biases_do_not() -> None:
    module = nn.Linear(2, 1)
    module.weight.requires_grad_(True)
    optimizer = make_optimizer(module, 0.5, weight_decay=0.1)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    module.weight.grad, module.bias.grad = torch.zeros(1, 2), torch.zeros(1)
    optimizer.step()
    torch.testing.assert_close(module.weight.detach(), before["weight"] * (1 - 0.5 * 0.1))
    assert torch.equal(module.bias, before["bias"])


def test_frozen_parameters_stay_out() -> None:
    module = nn.Linear(2, 1)
    module.weight.requires_grad_(False)
    (group,) = make_optimizer(module, 0.5).param_groups
    assert group["params"] == [module.bias]


def test_the_rate_reaches_every_group() -> None:
    optimizer = make_optimizer(nn.Linear(2, 1), 0.5)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


class Doubling:
    """A second process that has the same gradients as this one."""

    rank, size = 0, 2

    def __init__(self) -> None:
        self.exchanged: list[int] = []

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        self.exchanged.append(tensor.numel())
        return 2 * tensor


def test_gradients_of_all_processes_are_summed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer without a gradient here counts as zero, and no exchange is larger than the bound, one layer aside."""
    monkeypatch.setattr(optimisation, "SUMMED_AT_ONCE", 10)
    shapes = ((2, 3), (4,), (20,), (1,), (3, 3))
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for number, parameter in enumerate(parameters[:-1]):
        parameter.grad = torch.full(shapes[number], float(number + 1))
    world = Doubling()
    sum_gradients(parameters, world)
    assert world.exchanged == [10, 20, 10]
    for number, (parameter, shape) in enumerate(zip(parameters, shapes, strict=True)):
        expected = 0.0 if number == 4 else 2.0 * (number + 1)
        assert torch.equal(parameter.grad, torch.full(shape, expected))


def test_the_fused_step_is_adamw_as_written() -> None:
    """Three steps against the formulae of Loshchilov and Hutter 2019, algorithm 2, in float64."""
    torch.manual_seed(3)
    parameter = nn.Parameter(torch.randn(4, 2, dtype=torch.float64))
    module = nn.Module()
    module.weight = parameter
    optimizer = make_optimizer(module, 0.1, weight_decay=0.01, betas=(0.9, 0.95), eps=1e-6)
    weight = parameter.detach().clone()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(1, 4):
        gradient = torch.randn(4, 2, dtype=torch.float64)
        parameter.grad = gradient.clone()
        optimizer.step()
        first, second = 0.9 * first + 0.1 * gradient, 0.95 * second + 0.05 * gradient**2
        scaled = (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-6)
        weight = weight - 0.1 * (scaled + 0.01 * weight)
    torch.testing.assert_close(parameter.detach(), weight, rtol=1e-12, atol=1e-12)
