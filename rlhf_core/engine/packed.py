"""Llama and its next of kin on tokens without padding, straight from the weights of the transformers module.

The parameters stay the module's own, so gradients, optimisers, adapters and saving know nothing of this. Against
transformers' forward it saves the padding, the prompt of all but one of the responses that share it, the last
layer's feed-forward where nobody reads it, and most of what autograd would keep.
Shape suffixes: T = packed tokens, N = tokens whose state is wanted, D = hidden size, E = half a head.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
)
from transformers.models.mistral.modeling_mistral import (
    MistralAttention,
    MistralDecoderLayer,
    MistralMLP,
    MistralModel,
    MistralRMSNorm,
)
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2DecoderLayer,
    Qwen2MLP,
    Qwen2Model,
    Qwen2RMSNorm,
)
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3DecoderLayer,
    Qwen3MLP,
    Qwen3Model,
    Qwen3RMSNorm,
)
from transformers.models.smollm3.modeling_smollm3 import (
    SmolLM3Attention,
    SmolLM3DecoderLayer,
    SmolLM3MLP,
    SmolLM3Model,
    SmolLM3RMSNorm,
)

from rlhf_core.engine.attention import attend
from rlhf_core.engine.blocks import AttentionIn, AttentionOut, FeedForward
from rlhf_core.engine.kernels import Gather, RMSNorm, Spread, SwiGLU, Take, at_least_float32
from rlhf_core.engine.layout import Layout
from rlhf_core.engine.projections import Product, Projection, interleaved, projection_of
from rlhf_core.state.compute_mode import compute_mode
from rlhf_core.state.sharding import has_foreign_hooks, run_gathered, undivided_type

KNOWN = {
    LlamaModel: (LlamaDecoderLayer, LlamaAttention, LlamaMLP),
    MistralModel: (MistralDecoderLayer, MistralAttention, MistralMLP),
    Qwen2Model: (Qwen2DecoderLayer, Qwen2Attention, Qwen2MLP),
    Qwen3Model: (Qwen3DecoderLayer, Qwen3Attention, Qwen3MLP),
    SmolLM3Model: (SmolLM3DecoderLayer, SmolLM3Attention, SmolLM3MLP),
}
NORMS = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, SmolLM3RMSNorm)
FIXED_ROTATIONS = frozenset({"default", "linear", "llama3"})
"""Kinds of rotary positions whose angles depend on a token's position alone."""


def can_pack(body: nn.Module) -> bool:
    """Whether `packed_states` computes what the decoder's own forward does.

    It does for a decoder of `KNOWN` as transformers builds it, with adapters or not: full attention, positions by a
    fixed rotation or none, no dropout, no hooks, nothing wrapped or replaced. Its layers may be divided by
    `rlhf_core.state.sharding.shard`.
    """
    if type(body) not in KNOWN:
        return False
    config = body.config
    layer_type, attention_type, mlp_type = KNOWN[type(body)]
    plain = (
        config.hidden_act == "silu"
        and config.rope_parameters["rope_type"] in FIXED_ROTATIONS
        and not (body.training and config.attention_dropout)
        and not _slides(body)
    )
    built_so = all(
        undivided_type(layer) is layer_type and type(layer.self_attn) is attention_type and type(layer.mlp) is mlp_type
        for layer in body.layers
    )
    return plain and built_so and not any(map(has_foreign_hooks, body.modules()))


def _slides(body: nn.Module) -> bool:
    """Whether a layer sees the last tokens only."""
    if type(body) is MistralModel:  # which has no kinds of layers
        return body.config.sliding_window is not None
    return type(body) is not LlamaModel and body.has_sliding_layers


def rotates(attention: nn.Module) -> bool:
    """Whether queries and keys know their positions; SmolLM 3 has layers where they do not (NoPE)."""
    return type(attention) is not SmolLM3Attention or bool(attention.use_rope)


def norms_heads(attention: nn.Module) -> bool:
    """Whether each head of queries and keys has a norm of its own before it is rotated (Qwen 3)."""
    return type(attention) is Qwen3Attention


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
    rotations_T1E = torch.complex(at_least_float32(cos_1TD[0, :, :half]), at_least_float32(sin_1TD[0, :, :half]))[
        :, None
    ]
    layers = body.layers[: body.config.num_hidden_layers]
    for number, layer in enumerate(layers):
        wanted = wanted_N if number == len(layers) - 1 else None
        if compute_mode().activation_checkpointing and torch.is_grad_enabled():
            x_TD = checkpoint(run_gathered, layer, _layer, x_TD, rotations_T1E, layout, wanted, use_reentrant=False)
        else:
            x_TD = run_gathered(layer, _layer, x_TD, rotations_T1E, layout, wanted)
    return _norm(body.norm, x_TD)


def _layer(layer: nn.Module, x_TD: Tensor, rotations_T1E: Tensor, layout: Layout, wanted_N: Tensor | None) -> Tensor:
    """One decoder layer; its second half at the wanted tokens only."""
    attention = layer.self_attn
    num_heads, num_kv_heads = attention.config.num_attention_heads, attention.config.num_key_value_heads
    parts = _queries_keys_values(layer, x_TD, rotations_T1E, (num_heads, num_kv_heads), layout)
    attended = [
        attend(queries, keys, values, attention.scaling)
        for queries, keys, values in zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    ]
    out = projection_of(attention.o_proj) if wanted_N is None else None
    if out is not None:
        x_TD = AttentionOut.apply(x_TD, _product(x_TD, out), layout.groups, *out.tensors, *attended)
    else:
        attended_TD = Gather.apply(layout.groups, *attended)
        if wanted_N is not None:
            attended_TD, x_TD = Take.apply(attended_TD, wanted_N), Take.apply(x_TD, wanted_N)
        x_TD = x_TD + attention.o_proj(attended_TD)
    return _feed_forward(layer, x_TD)


def _queries_keys_values(
    layer: nn.Module, x_TD: Tensor, rotations_T1E: Tensor, heads: tuple[int, int], layout: Layout
) -> tuple[Tensor, ...]:
    """Queries, keys and values of each group of rows, rotated."""
    attention, norm = layer.self_attn, layer.input_layernorm
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    where = (rotations_T1E if rotates(attention) else torch.ones_like(rotations_T1E), heads, layout.groups)
    joined_parts = None if norms_heads(attention) else projection_of(*parts)
    if _is_norm(norm) and joined_parts is not None:
        normed = (norm.weight, norm.variance_epsilon, _product(x_TD, joined_parts))
        return AttentionIn.apply(x_TD, *normed, *where, *joined_parts.tensors)
    normed_TD, sizes = _norm(norm, x_TD), (attention.head_dim, attention.head_dim, 0)
    projected = [part(normed_TD) for part in parts]
    if norms_heads(attention):
        for place, head_norm in enumerate((attention.q_norm, attention.k_norm)):
            projected[place] = _norm(head_norm, projected[place].view(-1, attention.head_dim)).view_as(projected[place])
    joined = [interleaved(part, size, 1) for part, size in zip(projected, sizes, strict=True)]
    return Spread.apply(torch.cat(joined, 1), *where)


def _feed_forward(layer: nn.Module, x_TD: Tensor) -> Tensor:
    mlp, norm = layer.mlp, layer.post_attention_layernorm
    parts = (mlp.gate_proj, mlp.up_proj)
    gate_up, down = projection_of(*parts), projection_of(mlp.down_proj)
    if _is_norm(norm) and gate_up is not None and down is not None:
        products = _product(x_TD, gate_up), _product(x_TD, down)
        normed = (norm.weight, norm.variance_epsilon)
        return FeedForward.apply(x_TD, *normed, *products, *down.tensors, *gate_up.tensors)
    normed_TD = _norm(norm, x_TD)
    return x_TD + mlp.down_proj(SwiGLU.apply(torch.cat([part(normed_TD) for part in parts], 1)))


def _product(x_TD: Tensor, projection: Projection) -> Product:
    dtype = torch.bfloat16 if compute_mode().precision == "bfloat16" else x_TD.dtype
    return Product(dtype, projection.scales)


def _is_norm(norm: nn.Module) -> bool:
    return type(norm) in NORMS


def _norm(norm: nn.Module, x_TD: Tensor) -> Tensor:
    return RMSNorm.apply(x_TD, norm.weight, norm.variance_epsilon) if _is_norm(norm) else norm(x_TD)
