"""Llama and Qwen2 decoded straight from their weights, with a cache that is allocated once.

Shape suffixes: B = rows, P = prompt tokens, T = cache places (P + new tokens), H = heads, K = key-value heads,
N = B K, G = heads that share a key-value head, E = head size, D = hidden size, V = vocabulary.
"""

import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_core.data.batches import SequenceBatch
from rlhf_core.models.effective import effective_linear
from rlhf_core.rollout.packed_weight import PackedWeight
from rlhf_core.state.compute_mode import compute_mode

MODEL_TYPES = frozenset({"llama", "qwen2"})
ROPE_TYPES = frozenset({"default", "linear", "llama3"})
"""Rotary positions whose angles depend on the position alone and not on the length of the text."""

HIDDEN = -1e30
"""Added to the score of a place that is padding: its probability is then exactly 0."""


NEAR_BYTES = 24 * 2**20
"""Cache that is read several times faster than memory beyond the processor's own (measured at 24 to 64 rows)."""

FEWEST_ROWS = 32
"""Smaller batches cost more in calls and small products than a near cache spares."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layer:
    """Weights of one layer, those that read the same input joined, the weights of the norms multiplied in."""

    qkv: PackedWeight
    out: PackedWeight
    gate_up: PackedWeight
    down: PackedWeight


class StaticDecoder:
    """A `Decoder` that computes the same numbers as the model's own forward, up to the order of sums.

    It spares the bookkeeping of a general forward: no mask is rebuilt, no tensor concatenated, a prompt's last layer
    runs at its last place only, and keys lie the way that a single query reads them. The two halves of a head that
    rotate together are stored side by side, so that turning it is one complex product. The weights are copies, made
    when the decoder is: use it while the model does not change. Low-rank adapters count as in the model's forward.
    Where the process computes in bfloat16, products and cache are in it, the residual stream and norms are not.

    Args:
        model: one that `StaticDecoder.supports`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config, body = model.config, model.get_decoder()
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_size = body.layers[0].self_attn.head_dim
        self.embedding, self.rotary = body.embed_tokens.weight, body.rotary_emb
        halved = compute_mode().precision == "bfloat16"
        self.dtype = torch.bfloat16 if halved else self.embedding.dtype
        self.eps = torch.tensor(config.rms_norm_eps, device=self.embedding.device)
        self.layers = [self._layer(layer) for layer in body.layers]
        self.output = _joined([model.get_output_embeddings()], self.dtype, body.norm.weight)

    @staticmethod
    def supports(model: PreTrainedModel) -> bool:
        """Whether this decoder computes what `model` computes."""
        config = model.config
        if config.model_type not in MODEL_TYPES or config.hidden_act != "silu":
            return False
        slides = config.model_type == "qwen2" and config.use_sliding_window
        if slides or config.rope_parameters["rope_type"] not in ROPE_TYPES:
            return False
        body = model.get_decoder()
        linears = [part for layer in body.layers for part in _linears(layer)] + [model.get_output_embeddings()]
        return type(body.embed_tokens) is nn.Embedding and all(effective_linear(part) is not None for part in linears)

    def most_rows(self, places: int) -> int:
        """See `Decoder`; on a CPU so many that their cache stays in the processor's, yet enough for the products."""
        if self.embedding.device.type != "cpu":
            return sys.maxsize
        row_bytes = 2 * len(self.layers) * self.num_kv_heads * self.head_size * places * self.dtype.itemsize
        return max(FEWEST_ROWS, NEAR_BYTES // row_bytes)

    def prefill(self, prompts: SequenceBatch, max_new_tokens: int) -> Tensor:
        """See `Decoder`."""
        ids_BP, mask_BP = prompts.ids_BS, prompts.mask_BS.bool()
        rows, self.filled = ids_BP.shape
        self.places = self.filled + max_new_tokens
        self.keys = [self._room(rows, self.head_size, self.places) for _ in self.layers]
        self.values = [self._room(rows, self.places, self.head_size) for _ in self.layers]
        self.next_position_B = mask_BP.sum(1)
        cos, sin = self.rotary(self.eps, torch.arange(self.places, device=ids_BP.device)[None])
        half = self.head_size // 2
        self.turn_TE = torch.complex(cos[0, :, :half], sin[0, :, :half])
        hidden_BT = F.pad((~mask_BP).to(self.dtype) * HIDDEN, (0, max_new_tokens))
        self.hidden_N1T = hidden_BT.repeat_interleave(self.num_kv_heads, 0)[:, None]
        causal_PP = torch.ones(self.filled, self.filled, dtype=torch.bool, device=ids_BP.device).tril()
        # A padding place sees itself: a softmax over nothing is not a number.
        mask_BPP = causal_PP & mask_BP[:, None] | torch.eye(self.filled, dtype=torch.bool, device=ids_BP.device)
        return self._read(ids_BP, prompts.position_ids_BS, mask_BPP[:, None])

    def step(self, tokens_B: Tensor) -> Tensor:
        """See `Decoder`."""
        x_BD = self.embedding[tokens_B]
        turn_B1E = self.turn_TE[self.next_position_B, None]
        place, self.filled = self.filled, self.filled + 1
        hidden_N1T = self.hidden_N1T[..., : self.filled]
        scale, shape_NGE = self.head_size**-0.5, (len(hidden_N1T), -1, self.head_size)
        for layer, keys_BKET, values_BKTE in zip(self.layers, self.keys, self.values, strict=True):
            queries_BHE, keys_BKE, values_BKE = self._heads(layer.qkv(self._norm(x_BD)), turn_B1E)
            keys_BKET[..., place] = keys_BKE
            values_BKTE[:, :, place] = values_BKE
            keys_NET, values_NTE = keys_BKET.flatten(0, 1), values_BKTE.flatten(0, 1)
            queries_NGE = queries_BHE.reshape(shape_NGE)
            scores_NGT = torch.baddbmm(hidden_N1T, queries_NGE, keys_NET[..., : self.filled], alpha=scale)
            probs_NGT = torch.softmax(scores_NGT, -1, dtype=torch.float32).to(self.dtype)
            attended_NGE = torch.bmm(probs_NGT, values_NTE[:, : self.filled])
            x_BD = self._mlp(layer, layer.out(attended_NGE.view(len(x_BD), -1), plus=x_BD))
        self.next_position_B = self.next_position_B + 1
        return self.output(self._norm(x_BD))

    def select(self, rows: Tensor) -> None:
        """See `Decoder`."""
        for number, (keys_BKET, values_BKTE) in enumerate(zip(self.keys, self.values, strict=True)):
            self.keys[number] = self._room(len(rows), self.head_size, self.places)
            self.keys[number][..., : self.filled] = keys_BKET[..., : self.filled][rows]
            self.values[number] = self._room(len(rows), self.places, self.head_size)
            self.values[number][:, :, : self.filled] = values_BKTE[:, :, : self.filled][rows]
        self.hidden_N1T = self.hidden_N1T.unflatten(0, (-1, self.num_kv_heads))[rows].flatten(0, 1)
        self.next_position_B = self.next_position_B[rows]

    def _room(self, rows: int, *shape: int) -> Tensor:
        """Cache of one layer; what is not written is never read."""
        return torch.empty(rows, self.num_kv_heads, *shape, dtype=self.dtype, device=self.embedding.device)

    def _norm(self, x_ND: Tensor) -> Tensor:
        """Divide by the root of the mean square; the norm's weight is in the product that follows."""
        length_N1 = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True, dtype=torch.float32)
        scale_N1 = torch.addcmul(self.eps, length_N1, length_N1, value=1 / x_ND.shape[1]).rsqrt_()
        return x_ND * scale_N1.to(x_ND.dtype)

    def _heads(self, joined: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys turned to their positions, and values; heads are the last dimension but one."""
        heads = joined.unflatten(-1, (-1, self.head_size))
        turning, values = heads.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], -2)
        pairs = torch.view_as_complex(turning.float().unflatten(-1, (-1, 2)))
        turned = torch.view_as_real(pairs * turn).flatten(-2).to(joined.dtype)
        queries, keys = turned.split([self.num_heads, self.num_kv_heads], -2)
        return queries, keys, values

    def _mlp(self, layer: _Layer, x_ND: Tensor) -> Tensor:
        gate, up = layer.gate_up(self._norm(x_ND)).chunk(2, -1)
        return layer.down(F.silu(gate).mul_(up), plus=x_ND)

    def _read(self, ids_BP: Tensor, positions_BP: Tensor, mask: Tensor) -> Tensor:
        """Fill the cache with prompts, return the logits at their last places."""
        rows, width = ids_BP.shape
        x_ND = self.embedding[ids_BP.flatten()]
        turn_BP1E = self.turn_TE[positions_BP][:, :, None]
        for layer, keys_BKET, values_BKTE in zip(self.layers, self.keys, self.values, strict=True):
            joined = layer.qkv(self._norm(x_ND)).view(rows, width, -1)
            queries, keys, values = (heads.transpose(1, 2) for heads in self._heads(joined, turn_BP1E))
            keys_BKET[..., :width] = keys.transpose(2, 3)
            values_BKTE[:, :, :width] = values
            if layer is self.layers[-1]:
                x_ND = x_ND.view(rows, width, -1)[:, -1]
                queries, mask = queries[:, :, -1:], mask[:, :, -1:]
            grouped = self.num_heads != self.num_kv_heads
            attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=grouped)
            x_ND = self._mlp(layer, layer.out(attended.transpose(1, 2).reshape(len(x_ND), -1), plus=x_ND))
        return self.output(self._norm(x_ND))

    def _layer(self, layer: nn.Module) -> _Layer:
        query, key, value, out, gate, up, down = _linears(layer)
        turning = (self.num_heads + self.num_kv_heads) * self.head_size
        # rotate_half turns place i with place i + E/2
        order = torch.arange(turning).view(-1, 2, self.head_size // 2).transpose(1, 2).flatten()
        order = torch.cat([order, torch.arange(turning, turning + self.num_kv_heads * self.head_size)])
        return _Layer(
            qkv=_joined([query, key, value], self.dtype, layer.input_layernorm.weight, order),
            out=_joined([out], self.dtype),
            gate_up=_joined([gate, up], self.dtype, layer.post_attention_layernorm.weight),
            down=_joined([down], self.dtype),
        )


def _linears(layer: nn.Module) -> tuple[nn.Module, ...]:
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    return (*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj)


def _joined(
    parts: list[nn.Module], dtype: torch.dtype, scale_D: Tensor | None = None, order: Tensor | None = None
) -> PackedWeight:
    """One product for parts that read the same input, all of them with a bias or none.

    Args:
        parts: linear layers, whose outputs follow each other.
        dtype: in which the product is computed.
        scale_D: what the input is multiplied by.
        order: which of the outputs stand where.
    """
    linears = [effective_linear(part) for part in parts]
    weight = torch.cat([linear.weight for linear in linears]) if len(parts) > 1 else linears[0].weight
    biases = [linear.bias for linear in linears if linear.bias is not None]
    bias = torch.cat(biases) if biases else None
    if order is not None:
        weight, bias = weight[order], None if bias is None else bias[order]
    return PackedWeight(weight if scale_D is None else weight * scale_D, bias, dtype)
