"""Rows that are decoded together and come and go one by one.

Shape suffixes: B = rows, V = vocabulary, T = cache places, K = key-value heads, N = B K, E = head size, D = hidden
size, L = layers.
"""

import copy
from collections.abc import Collection, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_core.engine.batches import collate
from rlhf_core.models.mixture import PolicyMixture, mixed_logprobs
from rlhf_core.rollout.decoders import CacheDecoder
from rlhf_core.rollout.static_decoder import HIDDEN, StaticDecoder

FIRST_PLACES = 128
"""Cache places a row at first; they double when a row needs more."""


class Slots(Protocol):
    """Rows in an order of their own; whoever uses them keeps the same order."""

    def join(self, prompts: Sequence[list[int]], pad_id: int) -> Tensor:
        """Read prompts and put a row for each behind the others; logits_BV of their first tokens."""
        ...

    def step(self, tokens_B: Tensor) -> Tensor:
        """Append one token to every row, return logits_BV of the next."""
        ...

    def leave(self, gone: Collection[int]) -> list[int]:
        """Give up rows; of those that stay, the old place of each in its new one."""
        ...


def make_slots(model: PreTrainedModel | PolicyMixture) -> Slots:
    """The best that there is for `model`: one cache for all rows, or one a row where its architecture has no other."""
    if isinstance(model, PolicyMixture):
        return MixedSlots([make_slots(member) for member in model.members], model.shares)
    return CacheSlots(model) if StaticDecoder.supports(model) else SeparateRows(model)


def places_after(count: int, gone: Collection[int]) -> list[int]:
    """Which of `count` rows stands where when some are gone: the last ones fill the holes, the others stay."""
    kept = [row for row in range(count) if row not in gone]
    size = len(kept)
    late = iter(row for row in kept if row >= size)
    return [next(late) if place in gone else place for place in range(size)]


class CacheSlots(StaticDecoder):
    """`StaticDecoder` whose rows have lengths of their own: a row's token stands at the row's own next place.

    A row that leaves gives its slot to the last one, so the rows in use are always the first of the cache. What a slot
    held before is never read: places behind a row's end are hidden from it, and of a new row they are cleared.

    Args:
        model: one that `StaticDecoder.supports`; use the slots while it does not change.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.reader = copy.copy(self)  # reads prompts with the same weights, into a cache of its own
        self.lengths: list[int] = []
        self.cache_2LBKET = self._empty(0, 0)

    def join(self, prompts: Sequence[list[int]], pad_id: int) -> Tensor:
        """See `Slots`; a prompt that comes several times is read once."""
        place_of: dict[tuple[int, ...], int] = {}
        row_of = [place_of.setdefault(tuple(prompt), len(place_of)) for prompt in prompts]
        different = [list(prompt) for prompt in place_of]
        device = self.embedding.device
        logits_BV = self.reader.prefill(collate(different, [[]] * len(different), pad_id).to(device), 0)
        first, width = len(self.lengths), self.reader.filled
        self.lengths += [len(prompt) for prompt in prompts]
        self._make_room_for(len(self.lengths), max(self.lengths) + 1)
        rows = torch.tensor(row_of, device=device)
        new_2LBKET = self.cache_2LBKET[:, :, first : len(self.lengths)]
        new_2LBKET.zero_()
        for kind, cache in enumerate((self.reader.keys, self.reader.values)):
            for number, layer_BKET in enumerate(cache):
                new_2LBKET[kind, number, ..., :width] = layer_BKET[rows]
        return logits_BV[rows]

    def step(self, tokens_B: Tensor) -> Tensor:
        """See `Slots`."""
        rows, self.filled = len(self.lengths), max(self.lengths) + 1
        self._make_room_for(rows, self.filled)
        place_B = torch.tensor(self.lengths, device=tokens_B.device)
        row_B = torch.arange(rows, device=tokens_B.device)
        behind_BT = torch.arange(self.filled, device=tokens_B.device) > place_B[:, None]
        hidden_N1T = (behind_BT.to(self.dtype) * HIDDEN).repeat_interleave(self.num_kv_heads, 0)[:, None]
        rotation_B1E = self.rotation_TE[place_B][:, None]
        x_BD = F.embedding(tokens_B, self.embedding)
        for number, layer in enumerate(self.layers):
            queries_BHE, keys_BKE, values_BKE = self._split(self._rotated(layer, x_BD, rotation_B1E))
            self.keys[number][row_B, :, :, place_B] = keys_BKE
            self.values[number][row_B, :, :, place_B] = values_BKE
            x_BD = self._mlp(layer, layer.out(self._attend(number, queries_BHE, hidden_N1T), plus=x_BD))
        self.lengths = [length + 1 for length in self.lengths]
        return self.output(self._norm(x_BD))

    def leave(self, gone: Collection[int]) -> list[int]:
        """See `Slots`."""
        places = places_after(len(self.lengths), gone)
        for place, row in enumerate(places):
            if place != row:
                self.cache_2LBKET[:, :, place] = self.cache_2LBKET[:, :, row]
        self.lengths = [self.lengths[row] for row in places]
        self._look_at(len(places))
        return places

    def _make_room_for(self, rows: int, places: int) -> None:
        """A cache of at least so many rows and places, twice as large where it must grow."""
        had_rows, had_places = self.cache_2LBKET.shape[2], self.cache_2LBKET.shape[-1]
        if rows > had_rows or places > had_places:
            rows_then = had_rows if rows <= had_rows else max(rows, 2 * had_rows)
            places_then = had_places if places <= had_places else max(places, 2 * had_places, FIRST_PLACES)
            grown_2LBKET = self._empty(rows_then, places_then)
            grown_2LBKET[:, :, :had_rows, ..., :had_places] = self.cache_2LBKET
            self.cache_2LBKET = grown_2LBKET
            cos, sin = self.rotary(self.eps, torch.arange(places_then, device=self.embedding.device)[None])
            half = self.head_size // 2
            self.rotation_TE = torch.complex(cos[0, :, :half], sin[0, :, :half])
        self._look_at(rows)

    def _look_at(self, rows: int) -> None:
        keys_LBKET, values_LBKET = self.cache_2LBKET[:, :, :rows]
        self.keys, self.values = list(keys_LBKET), list(values_LBKET)

    def _empty(self, rows: int, places: int) -> Tensor:
        shape = (2, len(self.layers), rows, self.num_kv_heads, self.head_size, places)
        return torch.zeros(shape, dtype=self.dtype, device=self.embedding.device)


class SeparateRows:
    """Rows with a cache each, for every architecture: they come and go, but share no product.

    Args:
        model: a causal language model of transformers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.rows: list[CacheDecoder] = []

    def join(self, prompts: Sequence[list[int]], pad_id: int) -> Tensor:
        """See `Slots`."""
        new = [CacheDecoder(self.model) for _ in prompts]
        batches = [collate([prompt], [[]], pad_id).to(self.model.device) for prompt in prompts]
        logits = [decoder.prefill(batch, 0) for decoder, batch in zip(new, batches, strict=True)]
        self.rows += new
        return torch.cat(logits)

    def step(self, tokens_B: Tensor) -> Tensor:
        """See `Slots`."""
        return torch.cat([row.step(token_B) for row, token_B in zip(self.rows, tokens_B.split(1), strict=True)])

    def leave(self, gone: Collection[int]) -> list[int]:
        """See `Slots`."""
        places = places_after(len(self.rows), gone)
        self.rows = [self.rows[row] for row in places]
        return places


class MixedSlots:
    """Slots of the members of a mixture; their logits are the logarithm of the mixed distribution.

    Args:
        members: one a member.
        shares: how much each counts.
    """

    def __init__(self, members: Sequence[Slots], shares: Sequence[float]) -> None:
        self.members, self.shares = members, shares

    def join(self, prompts: Sequence[list[int]], pad_id: int) -> Tensor:
        """See `Slots`."""
        return self._mixed([member.join(prompts, pad_id) for member in self.members])

    def step(self, tokens_B: Tensor) -> Tensor:
        """See `Slots`."""
        return self._mixed([member.step(tokens_B) for member in self.members])

    def leave(self, gone: Collection[int]) -> list[int]:
        """See `Slots`."""
        places = [member.leave(gone) for member in self.members]
        return places[0]

    def _mixed(self, logits: Sequence[Tensor]) -> Tensor:
        return mixed_logprobs([torch.log_softmax(logits_BV.float(), -1) for logits_BV in logits], self.shares)
