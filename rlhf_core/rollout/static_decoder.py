"""Llama and its next of kin decoded straight from their weights, with a cache that is allocated once.

Shape suffixes: B = rows, P = prompt tokens, T = cache places (P + new tokens), H = heads, K = key-value heads,
N = B K, G = heads that share a key-value head, E = head size, D = hidden size, V = vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_core.engine.batches import SequenceBatch
from rlhf_core.engine.effective import effective_linear
from rlhf_core.engine.kernels import rotate
from rlhf_core.engine.matmul import pieces
from rlhf_core.engine.output_layer import PLAIN_HEADS
from rlhf_core.engine.packed import can_pack, norms_heads, rotates
from rlhf_core.engine.packed_weight import PackedWeight
from rlhf_core.engine.projections import interleaved
from rlhf_core.engine.quantised import quantised_layers
from rlhf_core.state.compute_mode import compute_mode

HIDDEN = -1e30
"""Added to the score of a place that is padding: its probability is then exactly 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layer:
    """Weights of one layer, those that read the same input joined, the weights of the norms multiplied in.

    Attributes:
        rotates: see `packed.rotates`.
        gains_HE: weights of the norms of single heads of queries and keys, where there are such norms.
    """

    rotates: bool
    gains_HE: Tensor | None
    qkv: PackedWeight
    out: PackedWeight
    gate_up: PackedWeight
    down: PackedWeight


class StaticDecoder:
    """A `Decoder` that computes the same numbers as the model's own forward, up to the order of sums.

    It spares the bookkeeping of a general forward: no mask is rebuilt, no tensor concatenated, a prompt's last layer
    runs at its last place only, and keys and values lie the way that a single query reads them fastest. The two halves
    of a head that rotate together are stored side by side, so that rotated it is one complex product. The weights are
    copies, made when the decoder is: use it while the model does not change. Low-rank adapters count as in the model's
    forward. Where the process computes in bfloat16, products and cache are in it, residual stream and norms are not.

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
        self.room = torch.empty(0, dtype=self.dtype, device=self.embedding.device)

    @staticmethod
    def supports(model: PreTrainedModel) -> bool:
        """Whether this decoder computes what `model` computes."""
        body = model.get_decoder()
        if any(quantised_layers(body)):  # of which this would hold a whole copy
            return False
        if not can_pack(body) or model.config.model_type not in PLAIN_HEADS:  # an adapter on the head is counted in
            return False
        linears = [part for layer in body.layers for part in _linears(layer)] + [model.get_output_embeddings()]
        return type(body.embed_tokens) is nn.Embedding and all(effective_linear(part) is not None for part in linears)

    def prefill(self, prompts: SequenceBatch, max_new_tokens: int) -> Tensor:
        """See `Decoder`."""
        mask_BP, device = prompts.mask_BS.bool(), prompts.mask_BS.device
        rows, self.filled = mask_BP.shape
        self.places = self.filled + max_new_tokens
        self._make_room(rows)
        self.next_position_B = mask_BP.sum(1)
        cos, sin = self.rotary(self.eps, torch.arange(self.places, device=device)[None])
        half = self.head_size // 2
        self.rotation_TE = torch.complex(cos[0, :, :half], sin[0, :, :half])
        # In the cache a prompt begins at the first place: over it attention is causal, with nothing to mask.
        behind_BP = torch.arange(self.filled, device=device) >= self.next_position_B[:, None]
        hidden_BT = F.pad(behind_BP.to(self.dtype) * HIDDEN, (0, max_new_tokens))
        self.hidden_N1T = hidden_BT.repeat_interleave(self.num_kv_heads, 0)[:, None]
        return self._read(prompts.ids_BS[mask_BP], prompts.position_ids_BS[mask_BP])

    def step(self, tokens_B: Tensor) -> Tensor:
        """See `Decoder`."""
        place, self.filled = self.filled, self.filled + 1
        hidden_N1T = self.hidden_N1T[..., : self.filled]
        logits_BV = self._next(tokens_B, hidden_N1T, lambda cache, new: cache.select(-1, place).copy_(new))
        self.next_position_B = self.next_position_B + 1
        return logits_BV

    def _next(self, tokens_B: Tensor, hidden_N1T: Tensor, write: Callable[[Tensor, Tensor], object]) -> Tensor:
        """Logits after one more token a row, which sees the first T places but for those that are hidden.

        Args:
            tokens_B: the tokens.
            hidden_N1T: what is added to the scores of the places.
            write: puts new keys or values, [B, K, E], into a layer's cache, [B, K, E, all places].
        """
        x_BD = F.embedding(tokens_B, self.embedding)
        rotation_B1E = self.rotation_TE.index_select(0, self.next_position_B)[:, None]
        for number, layer in enumerate(self.layers):
            queries_BHE, keys_BKE, values_BKE = self._split(self._rotated(layer, x_BD, rotation_B1E))
            write(self.keys[number], keys_BKE)
            write(self.values[number], values_BKE)
            x_BD = self._mlp(layer, layer.out(self._attend(number, queries_BHE, hidden_N1T), plus=x_BD))
        return self.output(self._norm(x_BD))

    def select(self, rows: Tensor) -> None:
        """See `Decoder`."""
        for cache in (self.keys, self.values):
            for number, layer_BKET in enumerate(cache):
                cache[number] = layer_BKET.new_empty(len(rows), *layer_BKET.shape[1:])
                cache[number][..., : self.filled] = layer_BKET[..., : self.filled][rows]
        self.hidden_N1T = self.hidden_N1T.unflatten(0, (-1, self.num_kv_heads))[rows].flatten(0, 1)
        self.next_position_B = self.next_position_B[rows]

    def _make_room(self, rows: int) -> None:
        """Cache for a batch, in the memory of the one before where that suffices; what is not written is never read.

        One piece for all layers: a large one goes back to the system when it is freed, and leaves no gaps.
        """
        shape = (2, len(self.layers), rows, self.num_kv_heads, self.head_size, self.places)
        size = math.prod(shape)
        if len(self.room) < size:
            self.room = self.room.new_empty(size)
        room, numbers = self.room[:size].view(shape), range(len(self.layers))
        self.keys, self.values = [room[0, number] for number in numbers], [room[1, number] for number in numbers]

    def _norm(self, x_ND: Tensor) -> Tensor:
        """Divide by the root of the mean square; the norm's weight is in the product that follows."""
        length_N1 = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True, dtype=torch.float32)
        scale_N1 = torch.addcmul(self.eps, length_N1, length_N1, value=1 / x_ND.shape[-1]).rsqrt_()
        return x_ND * scale_N1.to(x_ND.dtype)

    def _rotated(self, layer: _Layer, x_ND: Tensor, rotation_N1E: Tensor) -> Tensor:
        """Queries, keys and values side by side, joined_NJ, the first two rotated to their positions."""
        joined_NJ, num_rotated = layer.qkv(self._norm(x_ND)), self.num_heads + self.num_kv_heads
        if layer.gains_HE is not None:
            heads_NHE = joined_NJ.unflatten(1, (-1, self.head_size))[:, :num_rotated]
            heads_NHE.copy_(self._norm(heads_NHE) * layer.gains_HE)
        if layer.rotates:
            rotate(joined_NJ, rotation_N1E, num_rotated)
        return joined_NJ

    def _split(self, joined: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values; heads are the last dimension but one."""
        heads = joined.unflatten(-1, (-1, self.head_size))
        queries, keys, values = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], -2)
        return queries, keys, values

    def _attend(self, number: int, queries_BHE: Tensor, hidden_N1T: Tensor) -> Tensor:
        """What one query a row reads in a layer's cache, its heads side by side, attended_BD."""
        seen = hidden_N1T.shape[-1]
        keys_NET = self.keys[number].flatten(0, 1)[..., :seen]
        values_NET = self.values[number].flatten(0, 1)[..., :seen]
        queries_NGE = queries_BHE.reshape(len(keys_NET), -1, self.head_size)
        scores_NGT = torch.baddbmm(hidden_N1T, queries_NGE, keys_NET, alpha=self.head_size**-0.5)
        probs_NGT = torch.softmax(scores_NGT, -1, dtype=torch.float32).to(self.dtype)
        return torch.bmm(values_NET, probs_NGT.transpose(1, 2)).transpose(1, 2).reshape(len(queries_BHE), -1)

    def _mlp(self, layer: _Layer, x_ND: Tensor) -> Tensor:
        gate, up = layer.gate_up(self._norm(x_ND)).chunk(2, -1)
        return layer.down(F.silu(gate).mul_(up), plus=x_ND)

    def _read(self, ids_T: Tensor, positions_T: Tensor) -> Tensor:
        """Fill the cache with prompts, T tokens row after row; return the logits at their last places.

        Attention runs over padded rows, all else over the tokens alone and piece by piece: what a piece needs stays in
        the processor's own cache.
        """
        rows, width = len(self.next_position_B), self.filled
        row_T = torch.arange(rows, device=ids_T.device).repeat_interleave(self.next_position_B)
        place_T, last_B = row_T * width + positions_T, self.next_position_B.cumsum(0) - 1
        x_TD, rotation_T1E = self.embedding[ids_T], self.rotation_TE[positions_T][:, None]
        grouped, cuts = self.num_heads != self.num_kv_heads, pieces(len(x_TD), x_TD)
        size = (self.num_heads + 2 * self.num_kv_heads) * self.head_size
        padded = x_TD.new_zeros(rows * width, size, dtype=self.dtype)  # padding stays 0 in every layer
        for number, layer in enumerate(self.layers):
            for cut in cuts:
                padded[place_T[cut]] = self._rotated(layer, x_TD[cut], rotation_T1E[cut])
            queries, keys, values = self._split(padded.view(rows, width, -1))
            self.keys[number][..., :width] = keys.permute(0, 2, 3, 1)
            self.values[number][..., :width] = values.permute(0, 2, 3, 1)
            if number == len(self.layers) - 1:
                hidden_N1T, queries = self.hidden_N1T[..., :width], queries.flatten(0, 1)[place_T[last_B]]
                x_TD, attended = x_TD[last_B], self._attend(number, queries, hidden_N1T)
                return self.output(self._norm(self._mlp(layer, layer.out(attended, plus=x_TD))))
            queries, keys, values = (part.transpose(1, 2) for part in (queries, keys, values))
            attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=grouped)
            attended = attended.transpose(1, 2).reshape(rows * width, -1)
            x_TD = torch.cat([self._mlp(layer, layer.out(attended[place_T[cut]], plus=x_TD[cut])) for cut in cuts])
        raise AssertionError("a decoder has at least one layer")

    def _layer(self, layer: nn.Module) -> _Layer:
        query, key, value, out, gate, up, down = _linears(layer)
        attention, gains_HE = layer.self_attn, None
        if norms_heads(attention):
            gains = [(attention.q_norm, self.num_heads), (attention.k_norm, self.num_kv_heads)]
            gains_HE = torch.cat([interleaved(norm.weight, self.head_size).expand(n, -1) for norm, n in gains]).detach()
        rotated = (self.num_heads + self.num_kv_heads) * self.head_size
        # rotate_half rotates place i with place i + E/2
        order = torch.arange(rotated).view(-1, 2, self.head_size // 2).transpose(1, 2).flatten()
        order = torch.cat([order, torch.arange(rotated, rotated + self.num_kv_heads * self.head_size)])
        return _Layer(
            rotates=rotates(attention),
            gains_HE=gains_HE,
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
