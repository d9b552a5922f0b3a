"""What a linear layer multiplies with, adapters counted in."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlhf_core.engine.quantised import QuantisedLinear


class Linear(NamedTuple):
    """weight [out, in] and bias [out] of a linear layer."""

    weight: Tensor
    bias: Tensor | None


@torch.no_grad()
def effective_linear(layer: nn.Module) -> Linear | None:
    """Weight and bias of a plain linear layer that computes what `layer` computes now.

    A layer that carries low-rank adapters (peft) is W + sum of scale * B A over its active adapters (Hu et al. 2021,
    eq. 3), and W alone while they are disabled; a DoRA adapter by itself gives each row of that sum a length of its own
    (Liu et al. 2024, eq. 5). The weight of a plain layer is its own, not a copy; one in 8 or 4 bits is made whole.

    Returns:
        Weight and bias, or None where no such layer exists: other kinds of layers, adapters with biases of their own,
        DoRA beside other adapters, adapters that were merged into a weight and then disabled.
    """
    if type(layer) in (nn.Linear, QuantisedLinear):
        return Linear(layer.weight, layer.bias)
    if not type(layer).__module__.startswith("peft."):
        return None
    from peft.tuners.lora import Linear as LoraLinear

    if not isinstance(layer, LoraLinear) or type(layer.base_layer) not in (nn.Linear, QuantisedLinear):
        return None
    return _with_adapters(layer)


def _with_adapters(layer: nn.Module) -> Linear | None:
    base = layer.base_layer
    if layer.merged:
        return None if layer.disable_adapters else Linear(base.weight, base.bias)
    active = _active(layer)
    if not active:
        return Linear(base.weight, base.bias)
    variants = [name for name in active if name in layer.lora_variant]
    if any(layer.lora_bias[name] for name in active) or any(not layer.use_dora[name] for name in variants):
        return None
    if variants and len(active) > 1:
        return None
    weight = base.weight + sum(layer.get_delta_weight(name) for name in active)
    for name in variants:
        length = torch.linalg.vector_norm(weight, dim=1)
        weight = (layer.lora_magnitude_vector[name].weight / length)[:, None] * weight
    return Linear(weight, base.bias)


class LowRank(NamedTuple):
    """A linear layer, and the one adapter that is active on it: W + scale * B A, or W where A and B are None.

    Attributes:
        weight, bias: of the layer underneath, [out, in] and [out].
        down: A, [rank, in].
        up: B, [out, rank].
        scale: what B A is multiplied by.
    """

    weight: Tensor
    bias: Tensor | None
    down: Tensor | None = None
    up: Tensor | None = None
    scale: float = 1.0


def low_rank_of(layer: Any) -> LowRank | None:
    """A layer as weight and adapter, each the layer's own, so that gradients reach them.

    Returns:
        None for what computes more: other kinds of layers, several adapters at a time, adapters with dropout in
        training, with magnitudes or biases of their own, or in another number format than the weight.
    """
    if type(layer) is nn.Linear:
        return LowRank(layer.weight, layer.bias)
    base: Any = getattr(layer, "base_layer", None)
    if type(base) is not nn.Linear or not hasattr(layer, "lora_A") or layer.fan_in_fan_out:
        return None
    active = _active(layer)
    if layer.merged:
        return None if layer.disable_adapters else LowRank(base.weight, base.bias)
    if not active:
        return LowRank(base.weight, base.bias)
    name = active[0]
    drops = layer.training and getattr(layer.lora_dropout[name], "p", 0.0) > 0
    if len(active) > 1 or drops or name in layer.lora_variant or layer.lora_bias[name]:
        return None
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    if down.dtype != base.weight.dtype or up.dtype != base.weight.dtype:
        return None
    return LowRank(base.weight, base.bias, down, up, float(layer.scaling[name]))


def _active(layer: Any) -> list[str]:
    """Names of the adapters that count now."""
    return [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]
