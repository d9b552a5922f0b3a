"""The optimiser step that all trainers share: AdamW, clipping by norm, and a guard against numbers that are not."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlhf_core.errors import Diverged
from rlhf_core.state.sharding import whole
from rlhf_core.state.train_state import TrainState
from rlhf_core.state.world import ALONE, World

MOST_REFUSED = 3  # steps, or rollouts, in a row, before training is given up
REFUSED = "refused/"
SUMMED_AT_ONCE = 2**24  # numbers: 64 MiB of gradients in float32


def make_optimizer(
    module: nn.Module,
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) over a module's trainable parameters; matrices decay, gains and biases not.

    The fused kernel reads and writes every weight and moment once a step: three to seven times as fast on a CPU as one
    operation after the other (`foreach`).
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=learning_rate, betas=betas, eps=eps, fused=True
    )


def fresh_state(
    modules: Mapping[str, nn.Module], learning_rate: float, weight_decay: float = 0.0, **options: Any
) -> TrainState:
    """The state that training of some modules starts from, with an optimiser for each.

    Args:
        modules: by the names that the trainer expects: `policy`; `reward`; `policy` and `value`.
        learning_rate: the trainer's schedule sets the rate anew before each step.
        weight_decay, options: see `make_optimizer`.
    """
    optimizers = {name: make_optimizer(one, learning_rate, weight_decay, **options) for name, one in modules.items()}
    return TrainState(modules=dict(modules), optimizers=dict(optimizers))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the rate of the step that comes."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def apply_gradients(
    state: TrainState,
    name: str,
    loss: float,
    max_grad_norm: float,
    world: World = ALONE,
    *,
    max_grad_value: float | None = None,
) -> float | None:
    """`take_step`, where three refused steps in a row end the run.

    Raises:
        Diverged: three steps in a row were refused.
    """
    norm = take_step(state, name, loss, max_grad_norm, world, max_grad_value=max_grad_value)
    note_refusal(state, name, norm is not None, f"loss {loss} or its gradient")
    return norm


def take_step(
    state: TrainState,
    name: str,
    loss: float,
    max_grad_norm: float,
    world: World = ALONE,
    *,
    max_grad_value: float | None = None,
) -> float | None:
    """Take one step of `state.optimizers[name]` with the gradients that lie on its parameters, then clear them.

    Gradients are summed over the processes of `world`, so each holds the gradient of its share of one common loss;
    `loss` is that loss, the same in all of them. They are then scaled down to a norm of `max_grad_norm`, and each
    entry is cut to `max_grad_value` where that is given. A step whose loss or gradient is not finite is refused: no
    weight and no moment changes, and `state.extra["refused/<name>"]` counts it.

    Returns:
        The norm before clipping; None where the step was refused.
    """
    optimizer = state.optimizers[name]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    sum_gradients(parameters, world)
    total = grad_norm(parameters)
    norm = whole(total).item()
    taken = math.isfinite(loss) and math.isfinite(norm)
    if taken:
        nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, total, foreach=True)
        if max_grad_value is not None:
            nn.utils.clip_grad_value_(parameters, max_grad_value)
        optimizer.step()
    else:
        state.extra[REFUSED + name] = state.extra.get(REFUSED + name, 0) + 1
    optimizer.zero_grad(set_to_none=True)
    return norm if taken else None


def note_refusal(state: TrainState, name: str, taken: bool, what: str) -> None:
    """Count under `state.extra["refused_in_a_row/<name>"]` how often in a row something was refused; taken: 0 again.

    Raises:
        Diverged: it was the third time; `what` is what was not finite.
    """
    counter = f"refused_in_a_row/{name}"
    state.extra[counter] = 0 if taken else state.extra.get(counter, 0) + 1
    if state.extra[counter] >= MOST_REFUSED:
        raise Diverged(
            f"{name}: step {state.step + 1}: {what}: not finite {MOST_REFUSED} times in a row; the last good "
            "checkpoint is kept. Fix: lower learning_rate, or look at the data of this step"
        )


def refused_steps(state: TrainState) -> int:
    """Optimiser steps that were refused, of all models of the run: what they should have taught is not learned."""
    return sum(count for key, count in state.extra.items() if key.startswith(REFUSED))


@torch.no_grad()
def grad_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The norm of all gradients together, divided among processes where they are.

    Squares of entries from 1.8e19 on overflow in float32 although the entries do not: the norm is then taken again in
    float64, where it is a number as long as every entry is.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients, foreach=True)
    if bool(whole(norm).isfinite()):
        return norm
    return nn.utils.get_total_norm([gradient.double() for gradient in gradients])


@torch.no_grad()
def sum_gradients(parameters: Sequence[nn.Parameter], world: World) -> None:
    """Give every parameter the sum of its gradients over all processes, some megabytes an exchange.

    A parameter without a gradient here, of a process without rows, say, counts as zero. What is divided among
    processes (FSDP) was summed by its backward.
    """
    if world.size == 1:
        return
    bucket: list[nn.Parameter] = []
    for parameter in (parameter for parameter in parameters if not isinstance(parameter, DTensor)):
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > SUMMED_AT_ONCE:
            _sum_bucket(bucket, world)
            bucket = []
        bucket.append(parameter)
    if bucket:
        _sum_bucket(bucket, world)


def _sum_bucket(parameters: Sequence[nn.Parameter], world: World) -> None:
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    summed = world.total(torch.cat([gradient.flatten() for gradient in gradients]))
    for parameter, piece in zip(parameters, summed.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = piece.view_as(parameter)
