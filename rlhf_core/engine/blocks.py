"""The three blocks of a Llama or Qwen2 layer whose projections are plain, each one step of autograd.

What a block can make again without a matrix product it does not keep: normed inputs, activations, joined weights.
It works piece by piece (see `matmul`), so what lies between two products is small. Weights may be float32 while
products run in bfloat16 (`dtype`); sums over the residual stream stay in its own type.
Shape suffixes: T = packed tokens, D = hidden size, F = feed-forward width, J = joined outputs, E = half a head.
"""

from collections.abc import Sequence
from typing import Any

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


def interleaved(tensor: Tensor, head_size: int, dim: int = 0) -> Tensor:
    """Places a, b, c, ..., A, B, C, ... of each head become a, A, b, B, c, C, ...; head size 0 leaves them as they are.

    A rotation then rotates pairs that stand side by side, as `kernels.rotate` wants them.
    """
    if not head_size:
        return tensor
    return tensor.unflatten(dim, (-1, 2, head_size // 2)).transpose(dim + 1, dim + 2).reshape(tensor.shape)


def separated(tensor: Tensor, head_size: int) -> Tensor:
    """Undo `interleaved` along the first dimension."""
    if not head_size:
        return tensor
    return tensor.unflatten(0, (-1, head_size // 2, 2)).transpose(1, 2).reshape(tensor.shape)


class AttentionIn(torch.autograd.Function):
    """Norm, query, key and value projections as one product, rotation, and the padded rows that attention wants.

    Args:
        x_TD: residual stream.
        norm_weight_D, eps: the norm.
        dtype: of the product.
        rotations_T1E: see `kernels.rotate`.
        heads, groups: see `kernels.spread`.
        tensors: weights of queries, keys and values, then a bias or None for each.

    Returns:
        What `kernels.spread` does.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        norm_weight_D: Tensor,
        eps: float,
        dtype: torch.dtype,
        rotations_T1E: Tensor,
        heads: tuple[int, int],
        groups: tuple[AttentionGroup, ...],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        size = 2 * rotations_T1E.shape[-1]
        ctx.head_sizes, ctx.dtype, ctx.heads, ctx.groups = (size, size, 0), dtype, heads, groups
        inverse_T1 = inverse_rms(x_TD, eps)
        ctx.save_for_backward(x_TD, norm_weight_D, inverse_T1, rotations_T1E, *tensors)
        weight_JD, bias_J = _join(tensors, ctx.head_sizes, dtype)
        joined_TJ = weight_JD.new_empty(len(x_TD), len(weight_JD))
        for piece in pieces(len(x_TD), weight_JD):
            joined = linear(rms_norm(x_TD[piece], inverse_T1[piece], norm_weight_D, dtype), weight_JD, bias_J)
            rotate(joined, rotations_T1E[piece], sum(heads))
            joined_TJ[piece] = joined
        return spread(joined_TJ, heads, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x_TD, norm_weight_D, inverse_T1, rotations_T1E, *tensors = ctx.saved_tensors
        weight_JD, _ = _join(tensors, ctx.head_sizes, ctx.dtype)
        weights = _Sums(tensors, ctx.head_sizes, wanted=any(ctx.needs_input_grad[7:]))
        norm = _Sums([norm_weight_D, None], (0,), wanted=ctx.needs_input_grad[1])
        grad_TJ, grad_x_TD = spread_backward(gradients, ctx.groups), torch.empty_like(x_TD)
        rotations_T1E = rotations_T1E.conj()
        for piece in pieces(len(x_TD), weight_JD):
            grad, x, inverse = grad_TJ[piece], x_TD[piece], inverse_T1[piece]
            rotate(grad, rotations_T1E[piece], sum(ctx.heads))
            weights.add_product(grad, rms_norm(x, inverse, norm_weight_D, ctx.dtype))
            grad_x, grad_norm = rms_norm_backward(linear(grad, weight_JD.t()), x, inverse, norm_weight_D)
            norm.add(grad_norm)
            grad_x_TD[piece] = grad_x
        return grad_x_TD, *norm.gradients()[:1], *[None] * 5, *weights.gradients()


class AttentionOut(torch.autograd.Function):
    """Attended values back to tokens, through the output projection, onto the residual stream.

    Args:
        x_TD: residual stream.
        weight_DD, bias_D: the output projection.
        dtype: of the product.
        groups: where each token's result stands.
        attended: results of attention, one a group.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_DD: Tensor,
        bias_D: Tensor | None,
        dtype: torch.dtype,
        groups: tuple[AttentionGroup, ...],
        *attended: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(weight_DD, bias_D, *attended)
        ctx.dtype, ctx.groups = dtype, groups
        weight, bias = _join((weight_DD, bias_D), (0,), dtype)
        attended_TD, out_TD = gather(groups, attended), torch.empty_like(x_TD)
        for piece in pieces(len(x_TD), weight):
            torch.add(x_TD[piece], linear(attended_TD[piece], weight, bias), out=out_TD[piece])
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        weight_DD, bias_D, *attended = ctx.saved_tensors
        grad_TD = gradients[0].contiguous()
        narrow_TD, weight = grad_TD.to(ctx.dtype), weight_DD.to(ctx.dtype)
        sums = _Sums([weight_DD, bias_D], (0,), wanted=any(ctx.needs_input_grad[1:3]))
        attended_TD = gather(ctx.groups, attended)
        for piece in pieces(len(grad_TD), weight):
            sums.add_product(narrow_TD[piece], attended_TD[piece])
            attended_TD[piece] = linear(narrow_TD[piece], weight.t())  # its gradient, where it is not read again
        return grad_TD, *sums.gradients(), None, None, *gather_backward(attended_TD, ctx.groups, attended)


class FeedForward(torch.autograd.Function):
    """Norm, gate and up projection, SwiGLU, down projection, onto the residual stream; keeps x and gate and up.

    Args:
        x_TD: residual stream.
        norm_weight_D, eps: the norm.
        dtype: of the products.
        down_DF, down_bias_D: the down projection.
        tensors: gate and up weights, then a bias or None for each.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        norm_weight_D: Tensor,
        eps: float,
        dtype: torch.dtype,
        down_DF: Tensor,
        down_bias_D: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        inverse_T1, out_TD = inverse_rms(x_TD, eps), torch.empty_like(x_TD)
        weight_JD, bias_J = _join(tensors, (0, 0), dtype)
        down, down_bias = _join((down_DF, down_bias_D), (0,), dtype)
        kept = []
        for piece in pieces(len(x_TD), weight_JD):
            normed = rms_norm(x_TD[piece], inverse_T1[piece], norm_weight_D, dtype)
            kept.append(linear(normed, weight_JD, bias_J))
            torch.add(x_TD[piece], linear(swiglu(kept[-1])[0], down, down_bias), out=out_TD[piece])
        ctx.save_for_backward(x_TD, norm_weight_D, inverse_T1, down_DF, down_bias_D, *tensors, *kept)
        ctx.dtype = dtype
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x_TD, norm_weight_D, inverse_T1, down_DF, down_bias_D, *tensors = ctx.saved_tensors
        tensors, kept = tensors[:4], tensors[4:]
        grad_TD = gradients[0].contiguous()
        weight_JD, _ = _join(tensors, (0, 0), ctx.dtype)
        down, narrow_TD, grad_x_TD = down_DF.to(ctx.dtype), grad_TD.to(ctx.dtype), torch.empty_like(x_TD)
        norm = _Sums([norm_weight_D, None], (0,), wanted=ctx.needs_input_grad[1])
        downs = _Sums([down_DF, down_bias_D], (0,), wanted=any(ctx.needs_input_grad[4:6]))
        weights = _Sums(tensors, (0, 0), wanted=any(ctx.needs_input_grad[6:]))
        for piece, joined in zip(pieces(len(x_TD), weight_JD), kept, strict=True):
            grad, x, inverse = narrow_TD[piece], x_TD[piece], inverse_T1[piece]
            hidden, activated = swiglu(joined)
            downs.add_product(grad, hidden)
            grad_joined = swiglu_backward(linear(grad, down.t()), joined, activated)
            weights.add_product(grad_joined, rms_norm(x, inverse, norm_weight_D, ctx.dtype))
            grad_x, grad_norm = rms_norm_backward(linear(grad_joined, weight_JD.t()), x, inverse, norm_weight_D)
            norm.add(grad_norm)
            torch.add(grad_x, grad_TD[piece], out=grad_x_TD[piece])
        return grad_x_TD, *norm.gradients()[:1], None, None, *downs.gradients(), *weights.gradients()


class _Sums:
    """Gradients of joined weights and biases, added up over pieces; None for all of them where nobody wants them.

    Args:
        tensors: weights, then a bias or None for each.
        head_sizes: see `interleaved`.
        wanted: whether there is anything to add up.
    """

    def __init__(self, tensors: Sequence[Any], head_sizes: Sequence[int], *, wanted: bool) -> None:
        self.tensors, self.head_sizes, self.wanted = tensors, head_sizes, wanted
        self.has_bias = tensors[len(head_sizes)] is not None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def add_product(self, grad_TJ: Tensor, input_TD: Tensor) -> None:
        """A piece of a projection's output gradient and of its input."""
        if not self.wanted:
            return
        self.add(linear(grad_TJ.t(), input_TD.t()))
        if self.has_bias:
            bias_J = grad_TJ.sum(0, dtype=self.tensors[0].dtype)
            self.bias = bias_J if self.bias is None else self.bias.add_(bias_J)

    def add(self, weight: Tensor) -> None:
        """A piece of the weight's gradient."""
        if self.wanted:
            weight = weight.to(self.tensors[0].dtype)
            self.weight = weight if self.weight is None else self.weight.add_(weight)

    def gradients(self) -> list[Tensor | None]:
        """One for each of the tensors."""
        count = len(self.head_sizes)
        lengths = [len(weight) for weight in self.tensors[:count]]
        return [
            gradient
            for joined in (self.weight, self.bias)
            for gradient in (
                [None] * count
                if joined is None
                else [separated(part, size) for part, size in zip(joined.split(lengths), self.head_sizes, strict=True)]
            )
        ]


def _join(tensors: Sequence[Any], head_sizes: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """One weight and one bias of several projections; the copy costs little beside the product it serves."""
    count = len(head_sizes)
    weights = [interleaved(weight, size) for weight, size in zip(tensors[:count], head_sizes, strict=True)]
    weight = (weights[0] if count == 1 else torch.cat(weights)).to(dtype)
    if tensors[count] is None:
        return weight, None
    biases = [interleaved(bias, size) for bias, size in zip(tensors[count:], head_sizes, strict=True)]
    return weight, torch.cat(biases).to(dtype)
