"""The three blocks of a Llama or Qwen2 layer, with low-rank adapters or without, each one step of autograd.

What a block can make again without a matrix product it does not keep: normed inputs, activations, joined weights.
It works piece by piece (see `matmul`), so what lies between two products is small. Weights may be float32 while
products run in bfloat16 (`Product.dtype`); sums over the residual stream stay in its own type.
Shape suffixes: T = packed tokens, D = hidden size, F = feed-forward width, J = joined outputs, E = half a head.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_core.engine.kernels import (
    gather,
    gather_backward,
    inverse_rms,
    rms_norm,
    rms_norm_backward,
    rotate,
    spread,
    spread_backward,
    swiglu,
    swiglu_backward,
)
from rlhf_core.engine.layout import AttentionGroup
from rlhf_core.engine.matmul import linear, pieces
from rlhf_core.engine.projections import Product, ProductGradients, join


class AttentionIn(torch.autograd.Function):
    """Norm, query, key and value projections as one product, rotation, and the padded rows that attention wants.

    Args:
        x_TD: residual stream.
        norm_weight_D, eps: the norm.
        product: of queries, keys and values.
        rotations_T1E: see `kernels.rotate`.
        heads, groups: see `kernels.spread`.
        tensors: of queries, keys and values, as in `Projection`.

    Returns:
        What `kernels.spread` does.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        norm_weight_D: Tensor,
        eps: float,
        product: Product,
        rotations_T1E: Tensor,
        heads: tuple[int, int],
        groups: tuple[AttentionGroup, ...],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        size = 2 * rotations_T1E.shape[-1]
        ctx.head_sizes, ctx.product, ctx.heads, ctx.groups = (size, size, 0), product, heads, groups
        inverse_T1 = inverse_rms(x_TD, eps)
        ctx.save_for_backward(x_TD, norm_weight_D, inverse_T1, rotations_T1E, *tensors)
        weight_JD, bias_J = join(tensors, ctx.head_sizes, product)
        joined_TJ = weight_JD.new_empty(len(x_TD), len(weight_JD))
        for piece in pieces(len(x_TD), weight_JD):
            joined = linear(rms_norm(x_TD[piece], inverse_T1[piece], norm_weight_D, product.dtype), weight_JD, bias_J)
            rotate(joined, rotations_T1E[piece], sum(heads))
            joined_TJ[piece] = joined
        return spread(joined_TJ, heads, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x_TD, norm_weight_D, inverse_T1, rotations_T1E, *tensors = ctx.saved_tensors
        weight_JD, _ = join(tensors, ctx.head_sizes, ctx.product)
        weights = ProductGradients(tensors, ctx.head_sizes, ctx.product, ctx.needs_input_grad[7:])
        norm = _NormGradient(wanted=ctx.needs_input_grad[1])
        grad_TJ, grad_x_TD = spread_backward(gradients, ctx.groups), torch.empty_like(x_TD)
        rotations_T1E = rotations_T1E.conj()
        for piece in pieces(len(x_TD), weight_JD):
            grad, x, inverse = grad_TJ[piece], x_TD[piece], inverse_T1[piece]
            rotate(grad, rotations_T1E[piece], sum(ctx.heads))
            weights.add(grad, rms_norm(x, inverse, norm_weight_D, ctx.product.dtype))
            grad_x, grad_norm = rms_norm_backward(linear(grad, weight_JD.t()), x, inverse, norm_weight_D)
            norm.add(grad_norm)
            grad_x_TD[piece] = grad_x
        return grad_x_TD, norm.total, *[None] * 5, *weights.gradients()


class AttentionOut(torch.autograd.Function):
    """Attended values back to tokens, through the output projection, onto the residual stream.

    Args:
        x_TD: residual stream.
        product: of the output projection.
        groups: where each token's result stands.
        tensors: the four of the output projection, as in `Projection`, then the results of attention, one a group.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        product: Product,
        groups: tuple[AttentionGroup, ...],
        *tensors: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.product, ctx.groups = product, groups
        attended = cast(tuple[Tensor, ...], tensors[4:])
        weight, bias = join(tensors[:4], (0,), product)
        attended_TD, out_TD = gather(groups, attended), torch.empty_like(x_TD)
        for piece in pieces(len(x_TD), weight):
            torch.add(x_TD[piece], linear(attended_TD[piece], weight, bias), out=out_TD[piece])
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # once: activation checkpointing makes them anew and lets them go
        tensors, attended = saved[:4], saved[4:]
        grad_TD = gradients[0].contiguous()
        narrow_TD, (weight, _) = grad_TD.to(ctx.product.dtype), join(tensors, (0,), ctx.product)
        sums = ProductGradients(tensors, (0,), ctx.product, ctx.needs_input_grad[3:7])
        attended_TD = gather(ctx.groups, attended)
        for piece in pieces(len(grad_TD), weight):
            sums.add(narrow_TD[piece], attended_TD[piece])
            attended_TD[piece] = linear(narrow_TD[piece], weight.t())  # its gradient, where it is not read again
        return grad_TD, None, None, *sums.gradients(), *gather_backward(attended_TD, ctx.groups, attended)


class FeedForward(torch.autograd.Function):
    """Norm, gate and up projection, SwiGLU, down projection, onto the residual stream; keeps x and gate and up.

    Args:
        x_TD: residual stream.
        norm_weight_D, eps: the norm.
        gate_up, down: the two products.
        tensors: the four of the down projection, then those of gate and up, as in `Projection`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        norm_weight_D: Tensor,
        eps: float,
        gate_up: Product,
        down: Product,
        *tensors: Tensor | None,
    ) -> Tensor:
        inverse_T1, out_TD = inverse_rms(x_TD, eps), torch.empty_like(x_TD)
        weight_JD, bias_J = join(tensors[4:], (0, 0), gate_up)
        down_DF, down_bias_D = join(tensors[:4], (0,), down)
        kept = []
        for piece in pieces(len(x_TD), weight_JD):
            normed = rms_norm(x_TD[piece], inverse_T1[piece], norm_weight_D, gate_up.dtype)
            kept.append(linear(normed, weight_JD, bias_J))
            torch.add(x_TD[piece], linear(swiglu(kept[-1])[0], down_DF, down_bias_D), out=out_TD[piece])
        ctx.save_for_backward(x_TD, norm_weight_D, inverse_T1, *tensors, *kept)
        ctx.gate_up, ctx.down = gate_up, down
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x_TD, norm_weight_D, inverse_T1, *saved = ctx.saved_tensors
        of_down, of_gate_up, kept = saved[:4], saved[4:12], saved[12:]
        grad_TD = gradients[0].contiguous()
        (weight_JD, _), (down_DF, _) = join(of_gate_up, (0, 0), ctx.gate_up), join(of_down, (0,), ctx.down)
        narrow_TD, grad_x_TD = grad_TD.to(ctx.down.dtype), torch.empty_like(x_TD)
        norm = _NormGradient(wanted=ctx.needs_input_grad[1])
        downs = ProductGradients(of_down, (0,), ctx.down, ctx.needs_input_grad[5:9])
        weights = ProductGradients(of_gate_up, (0, 0), ctx.gate_up, ctx.needs_input_grad[9:])
        for piece, joined in zip(pieces(len(x_TD), weight_JD), kept, strict=True):
            grad, x, inverse = narrow_TD[piece], x_TD[piece], inverse_T1[piece]
            hidden, activated = swiglu(joined)
            downs.add(grad, hidden)
            grad_joined = swiglu_backward(linear(grad, down_DF.t()), joined, activated)
            weights.add(grad_joined, rms_norm(x, inverse, norm_weight_D, ctx.gate_up.dtype))
            grad_x, grad_norm = rms_norm_backward(linear(grad_joined, weight_JD.t()), x, inverse, norm_weight_D)
            norm.add(grad_norm)
            torch.add(grad_x, grad_TD[piece], out=grad_x_TD[piece])
        return grad_x_TD, norm.total, *[None] * 3, *downs.gradients(), *weights.gradients()


class _NormGradient:
    """Gradient of a norm's weight, added up over pieces; None where nobody wants it."""

    def __init__(self, *, wanted: bool) -> None:
        self.wanted = wanted
        self.total: Tensor | None = None

    def add(self, piece_D: Tensor) -> None:
        """A piece of it."""
        if self.wanted:
            self.total = piece_D if self.total is None else self.total.add_(piece_D)
