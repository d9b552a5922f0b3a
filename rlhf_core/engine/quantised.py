"""Linear layers whose frozen weights lie in 8 or 4 bits, and are made whole for each product (Dettmers et al. 2023).

bitsandbytes makes the codes and reads them back. Its own layers are not used: in evaluation mode, in which everything
here is trained so that dropout stays off, they give a CPU no gradient and, in bfloat16, other numbers with gradients
than without; those in 8 bits round what they are given, by columns that a batch has in common. Here a layer is
x W^T with one W, whatever the batch, with gradients or without; no pass keeps W, the backward pass makes it again.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rlhf_core.config.model import BaseWeights
from rlhf_core.errors import EnvironmentProblem

BLOCK = 64
"""Weights that share a scale in 4 bits, as in QLoRA; its second rounding, of the scales, is left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFormat:
    """How a weight [out, in] is held.

    Attributes:
        encode: codes and float32 scales of a float32 weight.
        decode: the weight in float32, of codes, scales and its shape.
    """

    encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    decode: Callable[[Tensor, Tensor, tuple[int, int]], Tensor]


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales, _ = _library().int8_vectorwise_quant(weight)
    return codes, scales


def _from_int8(codes: Tensor, scales: Tensor, _: tuple[int, int]) -> Tensor:
    return _library().int8_vectorwise_dequant(codes, scales)


def _nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    codes, state = _library().quantize_4bit(weight, blocksize=BLOCK, compress_statistics=False, quant_type="nf4")
    return codes, state.absmax


def _from_nf4(codes: Tensor, scales: Tensor, shape: tuple[int, int]) -> Tensor:
    state = _library().QuantState(
        scales, shape=torch.Size(shape), blocksize=BLOCK, quant_type="nf4", dtype=torch.float32
    )
    return _library().dequantize_4bit(codes, state)


FORMATS: Mapping[BaseWeights, WeightFormat] = MappingProxyType(
    {
        "int8": WeightFormat(encode=_int8, decode=_from_int8),
        "nf4": WeightFormat(encode=_nf4, decode=_from_nf4),
    }
)
"""`int8`: a scale a row, its largest number over 127. `nf4`: 16 quantiles of a normal distribution, times the largest
number of 64."""


class QuantisedLinear(nn.Linear):
    """A linear layer with frozen weights in a format of `FORMATS`; to peft a plain one.

    Args:
        layer: whose weight is encoded; its bias is kept, and frozen.
        kind: the format.
    """

    def __init__(self, layer: nn.Linear, kind: BaseWeights) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.kind = layer.in_features, layer.out_features, kind
        device = layer.weight.device  # the codes are made on the CPU, or devices would round numbers on an edge apart
        codes, scales = FORMATS[kind].encode(layer.weight.detach().cpu().float())
        self.codes = nn.Parameter(codes.to(device), requires_grad=False)
        self.scales = nn.Parameter(scales.to(device), requires_grad=False)
        self.register_parameter("bias", layer.bias)
        self.requires_grad_(requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The weight [out, in] that its codes stand for, float32, made anew."""
        return FORMATS[self.kind].decode(self.codes, self.scales, (self.out_features, self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """X W^T + b, in the type of x or that of autocast."""
        return _Product.apply(x, self)


class _Product(torch.autograd.Function):
    """x W^T + b; keeps neither x nor W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:
        kind = x.device.type
        ctx.layer, ctx.given = layer, x.dtype
        ctx.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            bias = None if layer.bias is None else layer.bias.to(ctx.dtype)
            return F.linear(x.to(ctx.dtype), layer.weight.to(ctx.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        with torch.autocast(gradients[0].device.type, enabled=False):
            return (gradients[0].to(ctx.dtype) @ ctx.layer.weight.to(ctx.dtype)).to(ctx.given), None


def quantised_layers(model: nn.Module) -> Iterator[tuple[str, QuantisedLinear]]:
    """Names and modules of the layers whose weights are held so, those under adapters too."""
    for name, module in model.named_modules():
        if isinstance(module, QuantisedLinear):
            yield name, module


def _library() -> Any:
    try:
        import bitsandbytes.functional as library
    except ImportError as error:
        raise EnvironmentProblem(
            "model.base_weights: bitsandbytes is not installed. Fix: pip install -e '.[quantised]', or float32"
        ) from error
    return library
