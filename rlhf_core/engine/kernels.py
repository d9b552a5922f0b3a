"""Small pieces of the packed forward, each with a backward written out that keeps less than autograd would.

Norms and rotations are computed in at least float32 whatever comes in. Every backward is held to finite differences
in float64 by tests.
Shape suffixes: T = packed tokens, D = width of a token, F = width of the feed-forward part, E = half a head,
J = all heads of queries, keys and values.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_core.engine.layout import AttentionGroup


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is where it holds more."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def inverse_rms(x_TD: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) of each token, [T, 1]."""
    squares_T1 = torch.linalg.vector_norm(at_least_float32(x_TD), dim=-1, keepdim=True).square_()
    return squares_T1.div_(x_TD.shape[-1]).add_(eps).rsqrt_()


def rms_norm(x_TD: Tensor, inverse_T1: Tensor, weight_D: Tensor, dtype: torch.dtype) -> Tensor:
    """w * x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019)."""
    return (at_least_float32(x_TD) * inverse_T1).mul_(weight_D).to(dtype)


def rms_norm_backward(grad_TD: Tensor, x_TD: Tensor, inverse_T1: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `rms_norm` for x (in at least float32) and the weight: r (g w - n mean(g w n)) and g n, n = x r."""
    grad_TD, normed_TD = at_least_float32(grad_TD), at_least_float32(x_TD) * inverse_T1
    product_TD = grad_TD * normed_TD
    grad_weight_D = product_TD.sum(0).to(weight_D.dtype)
    mean_T1 = (product_TD @ at_least_float32(weight_D)).div_(x_TD.shape[-1])[:, None]
    grad_x_TD = torch.mul(grad_TD, weight_D, out=product_TD).sub_(normed_TD.mul_(mean_T1)).mul_(inverse_T1)
    return grad_x_TD, grad_weight_D


def swiglu(joined_TF: Tensor) -> tuple[Tensor, Tensor]:
    """silu(gate) * up of the two halves of a tensor (Shazeer 2020), and silu(gate)."""
    gate_TF, up_TF = joined_TF.chunk(2, -1)
    activated_TF = F.silu(gate_TF)
    return activated_TF * up_TF, activated_TF


def swiglu_backward(grad_TF: Tensor, joined_TF: Tensor, activated_TF: Tensor) -> Tensor:
    """Gradient of `swiglu` for the joined halves; `grad_TF` is used up."""
    gate_TF, up_TF = joined_TF.chunk(2, -1)
    grad_joined_TF = torch.empty_like(joined_TF)
    into_gate_TF, into_up_TF = grad_joined_TF.chunk(2, -1)
    torch.mul(grad_TF, activated_TF, out=into_up_TF)
    torch.ops.aten.silu_backward.grad_input(grad_TF.mul_(up_TF), gate_TF, grad_input=into_gate_TF)
    return grad_joined_TF


class RMSNorm(torch.autograd.Function):
    """`rms_norm` by itself, in the type of its input; keeps x and one number a token."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        inverse_T1 = inverse_rms(x_TD, eps)
        ctx.save_for_backward(x_TD, weight_D, inverse_T1)
        return rms_norm(x_TD, inverse_T1, weight_D, x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_D, inverse_T1 = ctx.saved_tensors
        grad_x_TD, grad_weight_D = rms_norm_backward(gradients[0], x_TD, inverse_T1, weight_D)
        return grad_x_TD.to(x_TD.dtype), grad_weight_D, None


class SwiGLU(torch.autograd.Function):
    """`swiglu` by itself; keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, joined_TF: Tensor) -> Tensor:
        ctx.save_for_backward(joined_TF)
        return swiglu(joined_TF)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (joined_TF,) = ctx.saved_tensors
        return swiglu_backward(gradients[0].clone(), joined_TF, F.silu(joined_TF.chunk(2, -1)[0]))


def rotate(joined_TJ: Tensor, rotations_T1E: Tensor, num_rotated: int) -> None:
    """Rotate the first `num_rotated` heads of each token to its position, in place (RoPE, Su et al. 2021).

    Places 2i and 2i + 1 of a head are a pair that is rotated together, so a rotation is a product of complex numbers:
    `rotations_T1E` holds exp(i * angle), one a pair.
    """
    size = 2 * rotations_T1E.shape[-1]
    rotated = joined_TJ[:, : num_rotated * size].unflatten(1, (num_rotated, size // 2, 2))
    if rotated.dtype in (torch.float32, torch.float64):
        torch.view_as_complex(rotated).mul_(rotations_T1E)
    else:
        rotated.copy_(torch.view_as_real(torch.view_as_complex(rotated.float()) * rotations_T1E))


def spread(joined_TJ: Tensor, heads: tuple[int, int], groups: tuple[AttentionGroup, ...]) -> tuple[Tensor, ...]:
    """Lay heads of queries, keys and values, side by side in each token, out in the padded rows of attention.

    `heads` are the numbers of query and of key-value heads. Returns (queries, keys, values) of each group, [rows,
    heads, length, head size], one after the other.
    """
    num_heads, num_kv_heads = heads
    size = joined_TJ.shape[1] // (num_heads + 2 * num_kv_heads)
    parts: list[Tensor] = []
    for group in groups:
        rows = joined_TJ.index_select(0, group.reads).view(group.rows, group.length, -1, size)
        parts += [part.transpose(1, 2) for part in rows.split([num_heads, num_kv_heads, num_kv_heads], 2)]
    return tuple(parts)


def spread_backward(gradients: Sequence[Tensor], groups: tuple[AttentionGroup, ...]) -> Tensor:
    """Gradient of `spread`, [T, J]: a token that stands in several rows adds what comes from each; padding nothing."""
    width = sum(part.shape[1] * part.shape[3] for part in gradients[:3])
    grad_TJ = gradients[0].new_empty(groups[-1].tokens[1], width)
    for number, group in enumerate(groups):
        parts = [
            part.transpose(1, 2).reshape(group.rows * group.length, -1)
            for part in gradients[3 * number : 3 * number + 3]
        ]
        first, end = group.tokens
        torch.cat([part.index_select(0, group.takes) for part in parts], 1, out=grad_TJ[first:end])
        if len(group.again):
            again = torch.cat([part.index_select(0, group.again_places) for part in parts], 1)
            grad_TJ.index_add_(0, group.again, again)
    return grad_TJ


class Spread(torch.autograd.Function):
    """`rotate` and `spread` by themselves; the first argument is used up, for the rotation happens in place."""

    @staticmethod
    def forward(
        ctx: Any, joined_TJ: Tensor, rotations_T1E: Tensor, heads: tuple[int, int], groups: tuple[AttentionGroup, ...]
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(rotations_T1E)
        ctx.heads, ctx.groups = heads, groups
        rotate(joined_TJ, rotations_T1E, sum(heads))
        return spread(joined_TJ, heads, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (rotations_T1E,) = ctx.saved_tensors
        grad_TJ = spread_backward(gradients, ctx.groups)
        rotate(grad_TJ, rotations_T1E.conj(), sum(ctx.heads))
        return grad_TJ, None, None, None


def gather(groups: tuple[AttentionGroup, ...], attended: Sequence[Tensor]) -> Tensor:
    """Results of attention, [rows, heads, length, head size] a group, back to one row of tokens, [T, D]."""
    _, heads, _, size = attended[0].shape
    attended_TD = attended[0].new_empty(groups[-1].tokens[1], heads * size)
    for group, tensor in zip(groups, attended, strict=True):
        first, end = group.tokens
        padded = tensor.transpose(1, 2).reshape(group.rows * group.length, -1)
        torch.index_select(padded, 0, group.takes, out=attended_TD[first:end])
    return attended_TD


def gather_backward(grad_TD: Tensor, groups: tuple[AttentionGroup, ...], attended: Sequence[Tensor]) -> list[Tensor]:
    """Gradient of `gather` for each group; places that nobody read get 0."""
    parts = []
    for group, tensor in zip(groups, attended, strict=True):
        rows, heads, length, size = tensor.shape
        first, end = group.tokens
        padded = grad_TD.new_zeros(rows * length, heads * size)
        padded.index_copy_(0, group.takes, grad_TD[first:end])
        parts.append(padded.view(rows, length, heads, size).transpose(1, 2))
    return parts


class Gather(torch.autograd.Function):
    """`gather` by itself."""

    @staticmethod
    def forward(ctx: Any, groups: tuple[AttentionGroup, ...], *attended: Tensor) -> Tensor:
        ctx.groups = groups
        ctx.save_for_backward(*attended)  # for their shapes; attention keeps them anyhow
        return gather(groups, attended)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *gather_backward(gradients[0], ctx.groups, ctx.saved_tensors)


class Take(torch.autograd.Function):
    """Rows of a tensor, each at most once."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, rows_N: Tensor) -> Tensor:
        ctx.save_for_backward(rows_N)
        ctx.length = len(x_TD)
        return x_TD.index_select(0, rows_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (rows_N,) = ctx.saved_tensors
        grad_TD = gradients[0].new_zeros(ctx.length, gradients[0].shape[1])
        return grad_TD.index_copy_(0, rows_N, gradients[0]), None
