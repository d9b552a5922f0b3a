"""Weights, gradients and moments divided among processes (FSDP2), and how they become whole again.

Accelerate's FSDP plugin is not used: it is out of reach on several CPUs (its state takes a plugin only with
accelerators), it wraps the optimiser and the forward, and it divides gradients by the number of processes, where ours
are sums over shares of one loss. `fully_shard` of torch, which it calls too, needs no more than what stands here.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from rlhf_core.state.world import Item, World

Module = TypeVar("Module", bound=nn.Module)
Result = TypeVar("Result")
ORIGIN = "whole_module"


def shard(module: Module) -> Module:
    """A copy of `module` whose parameters are divided among all processes; `module` gives its own weights up.

    Each decoder layer is gathered when it computes and given back after; what is left (embeddings, norm, heads) is
    one more unit. `restore_whole` brings the weights back into `module`.
    """
    divided = copy.deepcopy(module)
    for layer in _decoder_layers(divided):
        fully_shard(layer)
    fully_shard(divided, reshard_after_forward=True)  # else its weights stay whole, and stale, after a bare forward
    for part in divided.modules():
        if isinstance(part, FSDPModule):
            part.run_gathered = MethodType(_run, part)
            register_fsdp_forward_method(part, "run_gathered")
            part.set_gradient_divide_factor(1.0)  # sums, not means, over the processes
            part.set_force_sum_reduction_for_comms(True)
    divided.__dict__[ORIGIN] = module  # beside its parts, not among them
    _empty(module)
    return divided


def _empty(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)


def run_gathered(module: nn.Module, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """`function(module, ...)`; the weights of a sharded module, but for those of its layers, are at hand meanwhile.

    For what computes with a module, or with a layer of one, otherwise than by calling it. Returns a tensor or a tuple
    of tensors.
    """
    if isinstance(module, FSDPModule):
        return module.run_gathered(function, *args, **kwargs)
    return function(module, *args, **kwargs)


def _run(module: nn.Module, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    return function(module, *args, **kwargs)


@contextmanager
def lend_whole(module: Module) -> Iterator[Module]:
    """The module, or of a sharded one the plain module with all weights, for as long as the context lasts.

    For sampling: processes write responses of different length, and pass through the policy a different number of
    times. All processes enter the context together.
    """
    if not isinstance(module, FSDPModule):
        yield module
        return
    plain = module.__dict__[ORIGIN]
    restore_whole(plain, module)
    try:
        yield plain
    finally:
        _empty(plain)


@torch.no_grad()
def restore_whole(module: nn.Module, divided: nn.Module) -> None:
    """Give `module` the weights and buffers that `divided`, once made of it by `shard`, has now; all processes call."""
    for target, source in zip(module.parameters(), divided.parameters(), strict=True):
        target.data = whole(source).clone()
    for target, source in zip(module.buffers(), divided.buffers(), strict=True):
        target.copy_(source)


def is_sharded(module: nn.Module) -> bool:
    """Whether `module` or its layers belong to FSDP: their weights are at hand only inside their own forward."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def undivided_type(module: nn.Module) -> type[nn.Module]:
    """The class of a module before `shard`, which gives what it divides a class of its own."""
    kind = type(module)
    return kind.__bases__[1] if isinstance(module, FSDPModule) else kind


def has_foreign_hooks(module: nn.Module) -> bool:
    """Whether calling a module would run anything of others; FSDP has one hook before and one after a forward."""
    own = int(isinstance(module, FSDPModule))
    forward = (module._forward_hooks, module._forward_pre_hooks)
    backward = (module._backward_hooks, module._backward_pre_hooks)
    return any(len(hooks) > own for hooks in forward) or any(map(len, backward))


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be divided; all processes call, and all get it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole `tensor`, divided as `like` is; every process holds the same whole one."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    on_device = tensor.to(like.device, like.dtype)
    return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def in_step(items: Sequence[Item], module: nn.Module, world: World) -> list[tuple[Item, float]]:
    """This process's micro-batches, each with weight 1, and as many in every process where `module` is sharded.

    Each forward of a sharded module gathers weights from all processes, so none may pass through it more often than
    another. Who has fewer micro-batches goes through one again with weight 0, which adds a zero gradient.
    """
    mine = [(item, 1.0) for item in items]
    if world.size == 1 or not is_sharded(module):
        return mine
    counts = torch.zeros(world.size)
    counts[world.rank] = len(mine)
    counts = world.total(counts)
    spare = list(items[:1]) if counts.min() else world.collect(items[:1])  # a process may have no rows of its own
    return mine + [(item, 0.0) for item in spare[:1]] * (int(counts.max()) - len(mine))


def _decoder_layers(module: nn.Module) -> Sequence[nn.Module]:
    """The longest list of modules in `module`: in every decoder of transformers, its layers."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    return max(lists, key=len, default=())
