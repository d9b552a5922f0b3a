"""Where the tokens of a batch go when there is no padding: one row of tokens, and padded rows for attention alone.

All of it is integer bookkeeping on the host, from the lengths that `collate` noted, so a GPU is never waited for.
Shape suffixes: B = rows of the batch, S = its columns, T = packed tokens, C = R + 1 with R the longest response.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_core.engine.batches import SequenceBatch

LEAST_FILLED = 0.85
"""Rows share a product of attention as long as the shortest is this share of the longest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionGroup:
    """Rows of similar length that attend in one product, padded on the right, so that a causal kernel needs no mask.

    Attributes:
        rows, length: shape of the padded rows.
        tokens: first and last + 1 of the packed tokens whose result is read from this group.
        reads: [rows * length], which token stands at each place; padding reads a token too, and nobody reads padding.
        takes: [tokens], the place that holds each token's result.
        again: tokens that stand in a further row of the group, because rows share a prompt.
        again_places: their places there.
    """

    rows: int
    length: int
    tokens: tuple[int, int]
    reads: Tensor
    takes: Tensor
    again: Tensor
    again_places: Tensor


class TokenSelection(NamedTuple):
    """Tokens whose state somebody wants.

    Attributes:
        wanted: places among the packed tokens, each once.
        pick: for each state to be returned its place in `wanted`; None where `wanted` is in order and complete.
    """

    wanted: Tensor
    pick: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A batch without its padding; a prompt that several rows share stands there once.

    Attributes:
        source_T: place of each token in the flattened `ids_BS`.
        positions_T: its position in its row.
        groups: attention, in the order of the tokens.
        read_tokens: of each row, on the host, its last prompt token and its response.
    """

    source_T: Tensor
    positions_T: Tensor
    groups: tuple[AttentionGroup, ...]
    read_tokens: tuple[np.ndarray, ...]

    def predicting(self) -> TokenSelection:
        """The token before each response token, in the order of the rows."""
        return self._reading([tokens[:-1] for tokens in self.read_tokens])

    def final(self) -> TokenSelection:
        """The last token of each row."""
        return self._reading([tokens[-1:] for tokens in self.read_tokens])

    def reading(self) -> tuple[TokenSelection, Tensor]:
        """The last prompt token and the response of each row, and their places in a flattened [B, C]."""
        columns = max(map(len, self.read_tokens))
        places = [row * columns + np.arange(len(tokens)) for row, tokens in enumerate(self.read_tokens)]
        return self._reading(self.read_tokens), _tensor(places, self.source_T.device)

    def _reading(self, pieces: Sequence[np.ndarray]) -> TokenSelection:
        device = self.source_T.device
        tokens = np.concatenate(pieces)
        wanted, pick = np.unique(tokens, return_inverse=True)
        if len(wanted) == len(tokens):
            return TokenSelection(_tensor([tokens], device), None)
        return TokenSelection(_tensor([wanted], device), _tensor([pick], device))


def layout_of(batch: SequenceBatch) -> Layout:
    """Lay out the tokens of a batch: rows by length, each with its prompt before it unless an earlier row has it."""
    prompts, responses, same = batch.shapes
    order = sorted(range(len(prompts)), key=lambda row: prompts[row] + responses[row])
    columns = batch.ids_BS.shape[1]
    prompt_tokens: dict[int, np.ndarray] = {}
    rows: list[np.ndarray] = [np.empty(0)] * len(order)
    source, positions, total = [], [], 0
    for row in order:
        first_column = row * columns + batch.prompt_width
        known = prompt_tokens.get(same[row])
        skipped = 0 if known is None else prompts[row]
        length = prompts[row] + responses[row]
        source.append(first_column - prompts[row] + np.arange(skipped, length))
        positions.append(np.arange(skipped, length))
        new = np.arange(total, total + length - skipped)
        total += len(new)
        rows[row] = new if known is None else np.concatenate((known, new))
        prompt_tokens.setdefault(same[row], new[: prompts[row]])
    device = batch.ids_BS.device
    return Layout(
        source_T=_tensor(source, device),
        positions_T=_tensor(positions, device),
        groups=tuple(_groups(order, rows, device)),
        read_tokens=tuple(tokens[length - 1 :] for tokens, length in zip(rows, prompts, strict=True)),
    )


def _groups(order: Sequence[int], rows: Sequence[np.ndarray], device: torch.device) -> list[AttentionGroup]:
    """Cut the rows, shortest first, where one would be too long for the shortest of its group."""
    groups: list[AttentionGroup] = []
    members: list[np.ndarray] = []
    for row in order:
        if members and len(members[0]) < LEAST_FILLED * len(rows[row]):
            groups.append(_group(members, groups[-1].tokens[1] if groups else 0, device))
            members = []
        members.append(rows[row])
    groups.append(_group(members, groups[-1].tokens[1] if groups else 0, device))
    return groups


def _group(members: Sequence[np.ndarray], first: int, device: torch.device) -> AttentionGroup:
    """`first`: tokens before it have their result in an earlier group."""
    length = max(map(len, members))
    reads = np.zeros((len(members), length), dtype=np.int64)
    real = np.zeros((len(members), length), dtype=bool)
    for number, tokens in enumerate(members):
        reads[number, : len(tokens)] = tokens
        real[number, : len(tokens)] = True
    places = np.flatnonzero(real)
    tokens = reads.reshape(-1)[places]
    _, where = np.unique(tokens, return_index=True)
    is_first = np.zeros(len(tokens), dtype=bool)
    is_first[where] = True
    is_first &= tokens >= first
    takes = places[is_first][np.argsort(tokens[is_first], kind="stable")]
    return AttentionGroup(
        rows=len(members),
        length=length,
        tokens=(first, first + len(takes)),
        reads=_tensor([reads.reshape(-1)], device),
        takes=_tensor([takes], device),
        again=_tensor([tokens[~is_first]], device),
        again_places=_tensor([places[~is_first]], device),
    )


def _tensor(pieces: Sequence[np.ndarray], device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate(pieces).astype(np.int64)).to(device, non_blocking=True)
