"""The three blocks of a Llama or Qwen2 layer whose projections are plain, each one step of autograd.

What a block can make again without a matrix product it does not keep: normed inputs, activations, joined weights.
Weights may be float32 while products run in bfloat16 (`dtype`); sums over the residual stream stay in its own type.
Shape suffixes: T = packed tokens, N = tokens whose state is wanted, D = hidden size, F = feed-forward width,
J = joined outputs.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_core.models.kernels import (
    gather,
    gather_backward,
    inverse_rms,
    rms_norm,
    rms_norm_backward,
    swiglu,
    swiglu_backward,
)
from rlhf_core.models.layout import AttentionGroup


def interleaved(tensor: Tensor, head_size: int, dim: int = 0) -> Tensor:
    """Places a, b, c, ..., A, B, C, ... of each head become a, A, b, B, c, C, ...; head size 0 leaves them as they are.

    A rotation then turns pairs that stand side by side, as `kernels.Spread` wants them.
    """
    if not head_size:
        return tensor
    return tensor.unflatten(dim, (-1, 2, head_size // 2)).transpose(dim + 1, dim + 2).reshape(tensor.shape)


def separated(tensor: Tensor, head_size: int) -> Tensor:
    """Undo `interleaved` along the first dimension."""
    if not head_size:
        return tensor
    return tensor.unflatten(0, (-1, head_size // 2, 2)).transpose(1, 2).reshape(tensor.shape)


class NormedProjections(torch.autograd.Function):
    """Several projections of one normed input as one product, outputs side by side.

    Args:
        x_TD: residual stream.
        norm_weight_D, eps: the norm.
        dtype: of the product.
        head_sizes: for each projection the size of heads to be interleaved, or 0.
        tensors: the weights, then a bias or None for each.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        norm_weight_D: Tensor,
        eps: float,
        dtype: torch.dtype,
        head_sizes: tuple[int, ...],
        *tensors: Tensor | None,
    ) -> Tensor:
        inverse_T1 = inverse_rms(x_TD, eps)
        ctx.save_for_backward(x_TD, norm_weight_D, inverse_T1, *tensors)
        ctx.dtype, ctx.head_sizes = dtype, head_sizes
        weight_JD, bias_J = _join(tensors, head_sizes, dtype)
        return F.linear(rms_norm(x_TD, inverse_T1, norm_weight_D, dtype), weight_JD, bias_J)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x_TD, norm_weight_D, inverse_T1, *tensors = ctx.saved_tensors
        (grad_TJ,) = gradients
        weight_JD, _ = _join(tensors, ctx.head_sizes, ctx.dtype)
        grads: list[Tensor | None] = [None] * len(tensors)
        if any(ctx.needs_input_grad[5:]):
            normed_TD = rms_norm(x_TD, inverse_T1, norm_weight_D, ctx.dtype)
            grads = _split_gradients(grad_TJ, normed_TD, tensors, ctx.head_sizes)
        grad_x_TD, grad_norm_D = rms_norm_backward(grad_TJ @ weight_JD, x_TD, inverse_T1, norm_weight_D)
        return grad_x_TD.to(x_TD.dtype), grad_norm_D, None, None, None, *grads


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
        ctx.save_for_backward(weight_DD, *attended)
        ctx.dtype, ctx.groups, ctx.has_bias = dtype, groups, bias_D is not None
        return _added_product(x_TD, gather(groups, attended), weight_DD, bias_D, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        weight_DD, *attended = ctx.saved_tensors
        (grad_TD,) = gradients
        narrow_TD = grad_TD.to(ctx.dtype)
        grad_weight_DD = None
        if ctx.needs_input_grad[1]:
            grad_weight_DD = (narrow_TD.t() @ gather(ctx.groups, attended)).to(weight_DD.dtype)
        grad_bias_D = grad_TD.sum(0).to(weight_DD.dtype) if ctx.has_bias else None
        parts = gather_backward(narrow_TD @ weight_DD.to(ctx.dtype), ctx.groups, attended)
        return grad_TD, grad_weight_DD, grad_bias_D, None, None, *parts


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
        inverse_T1 = inverse_rms(x_TD, eps)
        weight_JD, bias_J = _join(tensors, (0, 0), dtype)
        joined_TJ = F.linear(rms_norm(x_TD, inverse_T1, norm_weight_D, dtype), weight_JD, bias_J)
        ctx.save_for_backward(x_TD, norm_weight_D, inverse_T1, joined_TJ, down_DF, *tensors)
        ctx.dtype, ctx.has_bias = dtype, down_bias_D is not None
        return _added_product(x_TD, swiglu(joined_TJ)[0], down_DF, down_bias_D, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x_TD, norm_weight_D, inverse_T1, joined_TJ, down_DF, *tensors = ctx.saved_tensors
        (grad_TD,) = gradients
        narrow_TD = grad_TD.to(ctx.dtype)
        product_TF, activated_TF = swiglu(joined_TJ)
        grad_down_DF = (narrow_TD.t() @ product_TF).to(down_DF.dtype) if ctx.needs_input_grad[4] else None
        grad_bias_D = grad_TD.sum(0).to(down_DF.dtype) if ctx.has_bias else None
        torch.mm(narrow_TD, down_DF.to(ctx.dtype), out=product_TF)
        grad_TJ = swiglu_backward(product_TF, joined_TJ, activated_TF)
        del product_TF, activated_TF
        grads: list[Tensor | None] = [None] * len(tensors)
        if any(ctx.needs_input_grad[6:]):
            normed_TD = rms_norm(x_TD, inverse_T1, norm_weight_D, ctx.dtype)
            grads = _split_gradients(grad_TJ, normed_TD, tensors, (0, 0))
            del normed_TD
        weight_JD, _ = _join(tensors, (0, 0), ctx.dtype)
        grad_x_TD, grad_norm_D = rms_norm_backward(grad_TJ @ weight_JD, x_TD, inverse_T1, norm_weight_D)
        return grad_x_TD.add_(grad_TD).to(x_TD.dtype), grad_norm_D, None, None, grad_down_DF, grad_bias_D, *grads


def _join(
    tensors: Sequence[Any], head_sizes: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """One weight and one bias of several projections; the copy costs little beside the product it serves."""
    count = len(head_sizes)
    weights = [interleaved(weight, size) for weight, size in zip(tensors[:count], head_sizes, strict=True)]
    if tensors[count] is None:
        return torch.cat(weights).to(dtype), None
    biases = [interleaved(bias, size) for bias, size in zip(tensors[count:], head_sizes, strict=True)]
    return torch.cat(weights).to(dtype), torch.cat(biases).to(dtype)


def _split_gradients(
    grad_TJ: Tensor, normed_TD: Tensor, tensors: Sequence[Any], head_sizes: Sequence[int]
) -> list[Tensor | None]:
    """Gradients of the weights and biases that `_join` joined."""
    count = len(head_sizes)
    lengths = [len(weight) for weight in tensors[:count]]
    type_of_weights = tensors[0].dtype
    pieces = (grad_TJ.t() @ normed_TD).to(type_of_weights).split(lengths)
    grads: list[Tensor | None] = [separated(piece, size) for piece, size in zip(pieces, head_sizes, strict=True)]
    if tensors[count] is None:
        return grads + [None] * count
    pieces = grad_TJ.sum(0).to(type_of_weights).split(lengths)
    return grads + [separated(piece, size) for piece, size in zip(pieces, head_sizes, strict=True)]


def _added_product(
    x_TD: Tensor, input_TF: Tensor, weight_DF: Tensor, bias_D: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """x + input @ weight.T + bias."""
    if dtype == x_TD.dtype:
        added_TD = torch.addmm(x_TD, input_TF, weight_DF.t())
        return added_TD if bias_D is None else added_TD.add_(bias_D)
    return x_TD + F.linear(input_TF, weight_DF.to(dtype), None if bias_D is None else bias_D.to(dtype))
