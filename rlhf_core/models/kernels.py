"""Building blocks of the packed forward, each with a backward written out that keeps less than autograd would.

Norms and rotations are computed in at least float32 whatever comes in. Every backward is held to finite differences
in float64 by tests.
Shape suffixes: T = packed tokens, D = width of a token, F = width of the feed-forward part.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_core.models.layout import AttentionGroup


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is where it holds more."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


class RMSNorm(torch.autograd.Function):
    """y = w * x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019); keeps x and one number a token."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        wide_TD = at_least_float32(x_TD)
        inverse_T1 = torch.linalg.vector_norm(wide_TD, dim=-1, keepdim=True).square_().div_(x_TD.shape[-1])
        inverse_T1.add_(eps).rsqrt_()
        ctx.save_for_backward(x_TD, weight_D, inverse_T1)
        return (wide_TD * inverse_T1).mul_(weight_D).to(x_TD.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_D, inverse_T1 = ctx.saved_tensors
        grad_TD, normed_TD = at_least_float32(gradients[0]), at_least_float32(x_TD) * inverse_T1
        grad_weight_D = None
        if ctx.needs_input_grad[1]:
            grad_weight_D = torch.einsum("td,td->d", grad_TD, normed_TD).to(weight_D.dtype)
        # d x = r (g w - n mean(g w n)), n = x r
        scaled_TD = grad_TD * weight_D
        mean_T1 = torch.linalg.vecdot(scaled_TD, normed_TD).div_(x_TD.shape[-1])[:, None]
        grad_x_TD = scaled_TD.sub_(normed_TD.mul_(mean_T1)).mul_(inverse_T1)
        return grad_x_TD.to(x_TD.dtype), grad_weight_D, None


class SwiGLU(torch.autograd.Function):
    """y = silu(gate) * up, both halves of one tensor (Shazeer 2020); keeps that tensor alone."""

    @staticmethod
    def forward(ctx: Any, joined_TF: Tensor) -> Tensor:
        ctx.save_for_backward(joined_TF)
        gate_TF, up_TF = joined_TF.chunk(2, -1)
        return F.silu(gate_TF).mul_(up_TF)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (joined_TF,) = ctx.saved_tensors
        gate_TF, up_TF = joined_TF.chunk(2, -1)
        grad_TF = torch.empty_like(joined_TF)
        into_gate_TF, into_up_TF = grad_TF.chunk(2, -1)
        torch.mul(gradients[0], F.silu(gate_TF), out=into_up_TF)
        torch.mul(gradients[0], up_TF, out=into_gate_TF)
        into_gate_TF.copy_(torch.ops.aten.silu_backward(into_gate_TF, gate_TF))
        return grad_TF


class Spread(torch.autograd.Function):
    """Rotate queries and keys to their positions and lay queries, keys and values out in padded rows.

    `joined_TD` holds the heads of queries, keys and values of each token one after the other; within a head of the
    first two, places 2i and 2i + 1 are a pair that turns together (RoPE, Su et al. 2021), so a rotation is a product
    of complex numbers. It is used up: the rotation happens in place.

    Args:
        joined_TD: queries, keys and values.
        turns_T1E: exp(i * angle) of each token, complex, one number a pair.
        heads: numbers of query heads and of key-value heads.
        groups: where the tokens go.

    Returns:
        (queries, keys, values) of each group, [rows, heads, length, head size], one after the other.
    """

    @staticmethod
    def forward(
        ctx: Any, joined_TD: Tensor, turns_T1E: Tensor, heads: tuple[int, int], groups: tuple[AttentionGroup, ...]
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(turns_T1E)
        ctx.heads, ctx.groups, ctx.shape = heads, groups, joined_TD.shape
        num_heads, num_kv_heads = heads
        size = 2 * turns_T1E.shape[-1]
        _turn(joined_TD, turns_T1E, num_heads + num_kv_heads)
        parts: list[Tensor] = []
        for group in groups:
            rows = joined_TD.index_select(0, group.reads).view(group.rows, group.length, -1, size)
            parts += [part.transpose(1, 2) for part in rows.split([num_heads, num_kv_heads, num_kv_heads], 2)]
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (turns_T1E,) = ctx.saved_tensors
        grad_TD = gradients[0].new_empty(ctx.shape)
        for number, group in enumerate(ctx.groups):
            parts = [part.transpose(1, 2) for part in gradients[3 * number : 3 * number + 3]]
            rows = torch.cat(parts, 2).view(group.rows * group.length, -1)
            first, end = group.tokens
            torch.index_select(rows, 0, group.takes, out=grad_TD[first:end])
            if len(group.again):
                grad_TD.index_add_(0, group.again, rows.index_select(0, group.again_places))
        _turn(grad_TD, turns_T1E.conj(), sum(ctx.heads))
        return grad_TD, None, None, None


class Gather(torch.autograd.Function):
    """Results of attention, [rows, heads, length, head size] a group, back to one row of tokens, [T, D]."""

    @staticmethod
    def forward(ctx: Any, groups: tuple[AttentionGroup, ...], *attended: Tensor) -> Tensor:
        ctx.groups = groups
        ctx.shapes = [tensor.shape for tensor in attended]
        pieces = [
            tensor.transpose(1, 2).reshape(group.rows * group.length, -1).index_select(0, group.takes)
            for group, tensor in zip(groups, attended, strict=True)
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TD,) = gradients
        parts: list[Tensor | None] = [None]
        for group, (rows, heads, length, size) in zip(ctx.groups, ctx.shapes, strict=True):
            first, end = group.tokens
            spread = grad_TD.new_zeros(rows * length, heads * size)
            spread.index_copy_(0, group.takes, grad_TD[first:end])
            parts.append(spread.view(rows, length, heads, size).transpose(1, 2))
        return tuple(parts)


class Take(torch.autograd.Function):
    """Rows of a tensor, each at most once."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, rows_N: Tensor) -> Tensor:
        ctx.save_for_backward(rows_N)
        ctx.length = len(x_TD)
        return x_TD.index_select(0, rows_N)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (rows_N,) = ctx.saved_tensors
        grad_TD = gradients[0].new_zeros(ctx.length, gradients[0].shape[1])
        return grad_TD.index_copy_(0, rows_N, gradients[0]), None


def _turn(joined_TD: Tensor, turns_T1E: Tensor, num_turning: int) -> None:
    """Multiply the pairs of the first `num_turning` heads by `turns_T1E`, in place."""
    size = 2 * turns_T1E.shape[-1]
    turning = joined_TD[:, : num_turning * size].unflatten(1, (num_turning, size // 2, 2))
    if turning.dtype in (torch.float32, torch.float64):
        torch.view_as_complex(turning).mul_(turns_T1E)
    else:
        turning.copy_(torch.view_as_real(torch.view_as_complex(turning.float()) * turns_T1E))
