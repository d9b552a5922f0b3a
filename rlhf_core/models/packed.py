"""Llama and Qwen2 on tokens without padding, straight from the weights of the transformers module.

The parameters stay the module's own, so gradients, optimisers, adapters and saving know nothing of this. Against
transformers' forward it saves the padding, the prompt of all but one of the responses that share it, the last
layer's feed-forward where nobody reads it, and most of what autograd would keep.
Shape suffixes: T = packed tokens, N = tokens whose state is wanted, D = hidden size, E = half a head.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
)
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2DecoderLayer,
    Qwen2MLP,
    Qwen2Model,
    Qwen2RMSNorm,
)

from rlhf_core.models.compute import compute_mode
from rlhf_core.models.kernels import Gather, RMSNorm, Spread, SwiGLU, Take
from rlhf_core.models.layout import Layout

KNOWN = {
    LlamaModel: (LlamaDecoderLayer, LlamaAttention, LlamaMLP),
    Qwen2Model: (Qwen2DecoderLayer, Qwen2Attention, Qwen2MLP),
}
NORMS = (LlamaRMSNorm, Qwen2RMSNorm)
FIXED_ROTATIONS = frozenset({"default", "linear", "llama3"})
"""Kinds of rotary positions whose angles depend on a token's position alone."""


def can_pack(body: nn.Module) -> bool:
    """Whether `packed_states` computes what the decoder's own forward does.

    It does for a `LlamaModel` or `Qwen2Model` as transformers builds it, with adapters or not: full attention,
    positions by a fixed rotation, no dropout, no hooks, nothing wrapped or replaced (as FSDP does).
    """
    if type(body) not in KNOWN:
        return False
    config = body.config
    layer_type, attention_type, mlp_type = KNOWN[type(body)]
    plain = (
        config.hidden_act == "silu"
        and config.rope_parameters["rope_type"] in FIXED_ROTATIONS
        and not (body.training and config.attention_dropout)
        and not getattr(body, "has_sliding_layers", False)
    )
    built_so = all(
        type(layer) is layer_type and type(layer.self_attn) is attention_type and type(layer.mlp) is mlp_type
        for layer in body.layers
    )
    return plain and built_so and not any(_has_hooks(module) for module in body.modules())


def packed_states(body: nn.Module, ids_T: Tensor, layout: Layout, wanted_N: Tensor | None) -> Tensor:
    """Last hidden states (after the final norm) of the tokens `wanted_N`, each at most once; None: of all tokens.

    Args:
        body: a decoder that `can_pack`.
        ids_T: the tokens of the layout.
        layout: see `layout_of`.
        wanted_N: places among the T tokens.
    """
    x_TD = body.embed_tokens(ids_T)
    cos_1TD, sin_1TD = body.rotary_emb(x_TD, layout.positions_T[None])
    half = cos_1TD.shape[-1] // 2
    turns_T1E = torch.complex(_full(cos_1TD[0, :, :half]), _full(sin_1TD[0, :, :half]))[:, None]
    layers = body.layers[: body.config.num_hidden_layers]
    for number, layer in enumerate(layers):
        wanted = wanted_N if number == len(layers) - 1 else None
        if compute_mode().activation_checkpointing and torch.is_grad_enabled():
            x_TD = checkpoint(_layer, layer, x_TD, turns_T1E, layout, wanted, use_reentrant=False)
        else:
            x_TD = _layer(layer, x_TD, turns_T1E, layout, wanted)
    return _norm(body.norm, x_TD)


def _layer(layer: nn.Module, x_TD: Tensor, turns_T1E: Tensor, layout: Layout, wanted_N: Tensor | None) -> Tensor:
    """One decoder layer; its second half at the wanted tokens only."""
    attended_TD = _attend(layer.self_attn, _norm(layer.input_layernorm, x_TD), turns_T1E, layout)
    if wanted_N is not None:
        attended_TD, x_TD = Take.apply(attended_TD, wanted_N), Take.apply(x_TD, wanted_N)
    x_TD = x_TD + layer.self_attn.o_proj(attended_TD)
    normed_TD, mlp = _norm(layer.post_attention_layernorm, x_TD), layer.mlp
    joined_TF = _joined((mlp.gate_proj, mlp.up_proj), normed_TD)
    return x_TD + mlp.down_proj(SwiGLU.apply(joined_TF))


def _attend(attention: nn.Module, normed_TD: Tensor, turns_T1E: Tensor, layout: Layout) -> Tensor:
    size = attention.head_dim
    joined_TD = _joined((attention.q_proj, attention.k_proj, attention.v_proj), normed_TD, (size, size, 0))
    num_kv_heads = attention.config.num_key_value_heads
    num_heads = joined_TD.shape[1] // size - 2 * num_kv_heads
    parts = Spread.apply(joined_TD, turns_T1E, (num_heads, num_kv_heads), layout.groups)
    attended = [
        F.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=attention.scaling, enable_gqa=num_heads != num_kv_heads
        )
        for queries, keys, values in zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    ]
    return Gather.apply(layout.groups, *attended)


def _joined(parts: Sequence[nn.Module], x_TD: Tensor, head_sizes: Sequence[int] = ()) -> Tensor:
    """Outputs of projections that read the same input, side by side; one product where all are plain.

    Where a head size is given, the halves of the heads are interleaved: `Spread` wants a rotation's pairs adjacent.
    The weights are joined anew each time, which costs little beside the product and leaves the parameters as they are.
    """
    sizes = head_sizes or (0,) * len(parts)
    if not all(type(part) is nn.Linear for part in parts):
        outputs = [_interleaved(part(x_TD), size, -1) for part, size in zip(parts, sizes, strict=True)]
        return torch.cat(outputs, -1)
    weight = torch.cat([_interleaved(part.weight, size, 0) for part, size in zip(parts, sizes, strict=True)])
    biases = [_interleaved(p.bias, size, 0) for p, size in zip(parts, sizes, strict=True) if p.bias is not None]
    return F.linear(x_TD, weight, torch.cat(biases) if biases else None)


def _interleaved(tensor: Tensor, head_size: int, dim: int) -> Tensor:
    """Order a, b, c, ..., A, B, C, ... of each head becomes a, A, b, B, c, C, ...; 0 leaves it as it is."""
    if not head_size:
        return tensor
    heads = tensor.unflatten(dim, (-1, 2, head_size // 2))
    inside = heads.ndim - 2 if dim == -1 else dim + 1
    return heads.transpose(inside, inside + 1).reshape(tensor.shape)


def _norm(norm: nn.Module, x_TD: Tensor) -> Tensor:
    if type(norm) in NORMS:
        return RMSNorm.apply(x_TD, norm.weight, norm.variance_epsilon)
    return norm(x_TD)


def _full(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _has_hooks(module: Any) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
