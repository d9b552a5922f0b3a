"""Token-by-token decoding with a key-value cache: a fast way for Llama and Qwen2, transformers' own for the rest.

Shape suffixes: B = rows, P = prompt tokens, T = cache places (P + new tokens), H = heads, K = key-value heads,
E = head size, D = hidden size, V = vocabulary.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rlhf_core.data.batches import SequenceBatch

FUSED_TYPES = frozenset({"llama", "qwen2"})


class Decoder(Protocol):
    """Next-token logits for a batch of growing rows."""

    def prefill(self, prompts: SequenceBatch, max_new_tokens: int) -> Tensor:
        """Read the prompts, make room for new tokens, return logits_BV of the first."""
        ...

    def step(self, tokens_B: Tensor) -> Tensor:
        """Append one token to every row, return logits_BV of the next."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        ...


def make_decoder(model: PreTrainedModel) -> Decoder:
    """The fastest decoder that computes exactly what `model` does."""
    config = model.config
    plain = config.model_type in FUSED_TYPES and config.hidden_act == "silu"
    if plain and config.rope_parameters["rope_type"] == "default" and not _slides(model):
        return StaticDecoder(model)
    return CacheDecoder(model)


def _slides(model: PreTrainedModel) -> bool:
    return model.config.model_type == "qwen2" and bool(model.config.use_sliding_window)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layer:
    """Weights of one layer; those that read the same input are joined, so that one product serves them."""

    norm_attention: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    norm_mlp: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class StaticDecoder:
    """Llama and Qwen2 straight from their weights, with a cache that is allocated once.

    It computes the same numbers as the model's own forward (up to the order of sums), without the bookkeeping of a
    general one: no mask is rebuilt, no tensor concatenated, and a prompt's last layer runs at its last place only.
    The joined weights are copies, made when the decoder is: use it while the model does not change.

    Args:
        model: a `LlamaForCausalLM` or `Qwen2ForCausalLM` with ordinary rotary positions and full attention.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config
        body = model.model
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_size = body.layers[0].self_attn.head_dim
        self.eps = config.rms_norm_eps
        self.embedding, self.norm = body.embed_tokens.weight, body.norm.weight
        self.output, self.output_bias = model.lm_head.weight, model.lm_head.bias
        self.rotary = body.rotary_emb
        self.layers = [_joined(layer) for layer in body.layers]

    def prefill(self, prompts: SequenceBatch, max_new_tokens: int) -> Tensor:
        """See `Decoder`."""
        ids_BP, mask_BP = prompts.ids_BS, prompts.mask_BS.bool()
        rows, width = ids_BP.shape
        self.places = width + max_new_tokens
        shape = (rows, self.num_kv_heads, self.places, self.head_size)
        self.keys = [self.embedding.new_zeros(shape) for _ in self.layers]
        self.values = [self.embedding.new_zeros(shape) for _ in self.layers]
        self.filled = width
        self.next_position_B = mask_BP.sum(1)
        all_positions = torch.arange(self.places, device=ids_BP.device)[None]
        cos, sin = self.rotary(self.embedding, all_positions)
        # rotate_half's minus sign goes into the first half of the sine once, and not into every product
        half = self.head_size // 2
        self.cos_TE, self.sin_TE = cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)
        self.mask_BT = F.pad(mask_BP, (0, max_new_tokens), value=True)
        causal_PP = torch.ones(width, width, dtype=torch.bool, device=ids_BP.device).tril()
        mask_BPP = causal_PP & mask_BP[:, None]
        # A padding place sees itself: a softmax over nothing is not a number.
        mask_BPP = mask_BPP | torch.eye(width, dtype=torch.bool, device=ids_BP.device)
        return self._forward(ids_BP, prompts.position_ids_BS, mask_BPP[:, None], 0)

    def step(self, tokens_B: Tensor) -> Tensor:
        """See `Decoder`."""
        start = self.filled
        self.filled += 1
        mask = self.mask_BT[:, None, None, : self.filled]
        logits_BV = self._forward(tokens_B[:, None], self.next_position_B[:, None], mask, start)
        self.next_position_B = self.next_position_B + 1
        return logits_BV

    def keep(self, rows: Tensor) -> None:
        """See `Decoder`."""
        self.keys = [tensor[rows] for tensor in self.keys]
        self.values = [tensor[rows] for tensor in self.values]
        self.mask_BT, self.next_position_B = self.mask_BT[rows], self.next_position_B[rows]

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor, start: int) -> Tensor:
        """Logits at the last of the given places, while the cache takes in all of them from `start` on."""
        x = self.embedding[ids]
        cos, sin = self.cos_TE[positions][:, :, None], self.sin_TE[positions][:, :, None]
        for number, layer in enumerate(self.layers):
            is_last = number == len(self.layers) - 1
            attended = self._attend(number, layer, x, cos, sin, mask, start, only_last=is_last)
            if is_last:
                x = x[:, -1:]
            x = x + F.linear(attended, layer.out, layer.out_bias)
            normed = F.rms_norm(x, x.shape[-1:], layer.norm_mlp, self.eps)
            gate, up = F.linear(normed, layer.gate_up, layer.gate_up_bias).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer.down, layer.down_bias)
        x = F.rms_norm(x[:, -1], x.shape[-1:], self.norm, self.eps)
        return F.linear(x, self.output, self.output_bias)

    def _attend(
        self,
        number: int,
        layer: _Layer,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        start: int,
        *,
        only_last: bool,
    ) -> Tensor:
        rows, length, _ = x.shape
        end = start + length
        normed = F.rms_norm(x, x.shape[-1:], layer.norm_attention, self.eps)
        joined = F.linear(normed, layer.qkv, layer.qkv_bias)
        heads = joined.view(rows, length, -1, self.head_size)
        turning, values = heads.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], 2)
        turned = turning * cos + turning.roll(self.head_size // 2, -1) * sin
        queries, keys = turned.split([self.num_heads, self.num_kv_heads], 2)
        self.keys[number][:, :, start:end] = keys.transpose(1, 2)
        self.values[number][:, :, start:end] = values.transpose(1, 2)
        if only_last:
            queries, mask = queries[:, -1:], mask[:, :, -1:]
        attended = F.scaled_dot_product_attention(
            queries.transpose(1, 2),
            self.keys[number][:, :, :end],
            self.values[number][:, :, :end],
            attn_mask=mask,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
        return attended.transpose(1, 2).reshape(rows, queries.shape[1], -1)


class CacheDecoder:
    """Any causal language model through its own forward and the library's cache.

    Args:
        model: a causal language model of transformers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def prefill(self, prompts: SequenceBatch, max_new_tokens: int) -> Tensor:
        """See `Decoder`."""
        self.cache = DynamicCache(config=self.model.config)
        self.mask_BT = prompts.mask_BS
        self.next_position_B = prompts.mask_BS.sum(1)
        return self._forward(prompts.ids_BS, prompts.position_ids_BS)

    def step(self, tokens_B: Tensor) -> Tensor:
        """See `Decoder`."""
        self.mask_BT = F.pad(self.mask_BT, (0, 1), value=1)
        logits_BV = self._forward(tokens_B[:, None], self.next_position_B[:, None])
        self.next_position_B = self.next_position_B + 1
        return logits_BV

    def keep(self, rows: Tensor) -> None:
        """See `Decoder`."""
        self.cache.batch_select_indices(rows)
        self.mask_BT, self.next_position_B = self.mask_BT[rows], self.next_position_B[rows]

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.model(
            input_ids=ids,
            attention_mask=self.mask_BT,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]


def _joined(layer: torch.nn.Module) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    queries_keys_values = (attention.q_proj, attention.k_proj, attention.v_proj)
    return _Layer(
        norm_attention=layer.input_layernorm.weight,
        qkv=torch.cat([part.weight for part in queries_keys_values]),
        qkv_bias=_joined_bias(*queries_keys_values),
        out=attention.o_proj.weight,
        out_bias=attention.o_proj.bias,
        norm_mlp=layer.post_attention_layernorm.weight,
        gate_up=torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
        gate_up_bias=_joined_bias(mlp.gate_proj, mlp.up_proj),
        down=mlp.down_proj.weight,
        down_bias=mlp.down_proj.bias,
    )


def _joined_bias(*parts: torch.nn.Linear) -> Tensor | None:
    biases = [part.bias for part in parts if part.bias is not None]
    return torch.cat(biases) if biases else None
