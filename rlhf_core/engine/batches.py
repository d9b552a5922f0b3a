"""Token lists to padded tensors, and which rows share a batch.

Shape suffixes: B = rows, P = prompt tokens, R = response tokens, S = P + R.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")

CHUNK_BATCHES = 16  # rows are sorted by length inside chunks of so many batches, so that an epoch stays well mixed
ROWS_AT_ONCE = 64
"""Rows of a forward pass without gradients: on two cores twice as fast as 256, whose activations leave the cache."""
WIDE_ROWS_AT_ONCE = 256
"""What the stages `reward` and `align` read at once: their published figures have the last digits that it gives."""


class RowShapes(NamedTuple):
    """What a batch is made of, a number a row each.

    Attributes:
        prompts: tokens of the prompt.
        responses: tokens of the response.
        same_prompt: the first row that has the very same prompt, which may be the row itself.
    """

    prompts: tuple[int, ...]
    responses: tuple[int, ...]
    same_prompt: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceBatch:
    """Prompts padded on the left, responses on the right: one column separates them in every row.

    Attributes:
        ids_BS: token ids (int64).
        mask_BS: 1 for tokens, 0 for padding (int64). Made from lengths: the padding id may be a real token elsewhere.
        prompt_width: P; every response begins in this column.
        shapes: lengths of the rows, and which share a prompt, as numbers on the host.
    """

    ids_BS: Tensor
    mask_BS: Tensor
    prompt_width: int
    shapes: RowShapes

    @property
    def response_ids_BR(self) -> Tensor:
        """Token ids of the responses."""
        return self.ids_BS[:, self.prompt_width :]

    @property
    def response_mask_BR(self) -> Tensor:
        """1.0 for response tokens, 0.0 for padding (float32)."""
        return self.mask_BS[:, self.prompt_width :].float()

    @property
    def position_ids_BS(self) -> Tensor:
        """Place of each token in its own row, from 0; padding before the prompt has 0 too."""
        return (self.mask_BS.cumsum(1) - 1).clamp_min(0)

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.mask_BS.sum())

    def to(self, device: torch.device | str) -> "SequenceBatch":
        """The batch on another device."""
        return replace(self, ids_BS=self.ids_BS.to(device), mask_BS=self.mask_BS.to(device))


def collate(prompts: Sequence[list[int]], responses: Sequence[list[int]], pad_id: int) -> SequenceBatch:
    """Pad rows of tokens to one batch.

    Raises:
        ValueError: no rows, not one response a prompt, or a prompt without tokens.
    """
    if not prompts or len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts and {len(responses)} responses; one response a prompt is needed")
    if not all(prompts):
        raise ValueError("a prompt has no tokens: its response's first token could not be predicted")
    width = max(map(len, prompts))
    room = max(map(len, responses))
    ids, mask = [], []
    for prompt, response in zip(prompts, responses, strict=True):
        left, right = width - len(prompt), room - len(response)
        ids.append([pad_id] * left + prompt + response + [pad_id] * right)
        mask.append([0] * left + [1] * (len(prompt) + len(response)) + [0] * right)
    shapes = RowShapes(tuple(map(len, prompts)), tuple(map(len, responses)), first_places([tuple(p) for p in prompts]))
    return SequenceBatch(ids_BS=torch.tensor(ids), mask_BS=torch.tensor(mask), prompt_width=width, shapes=shapes)


def first_places(items: Sequence[Hashable]) -> tuple[int, ...]:
    """For each item the place of the first one that is equal to it."""
    known: dict[Hashable, int] = {}
    return tuple(known.setdefault(item, place) for place, item in enumerate(items))


def length_buckets(lengths: Sequence[Any], batch_size: int, generator: torch.Generator) -> list[list[int]]:
    """Row numbers of an epoch's batches: shuffled, yet rows of one batch are of similar length.

    Rows are shuffled, sorted by length within chunks of 16 batches, cut, and the batches are shuffled. Every row
    comes once; there are `ceil(rows / batch_size)` batches, and at most one of them is smaller than the others.

    Args:
        lengths: a number a row, or a tuple to sort by several lengths.
        batch_size: rows of a batch.
        generator: decides every choice, so an epoch's composition is addressed by its generator alone.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    span = CHUNK_BATCHES * batch_size
    batches = []
    for start in range(0, len(order), span):
        chunk = sorted(order[start : start + span], key=lambda row: lengths[row])
        batches += cut(chunk, batch_size)
    return [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]


def by_length(lengths: Sequence[Any], batch_size: int = ROWS_AT_ONCE) -> list[list[int]]:
    """Row numbers of the batches of a pass without gradients: rows of like length together, the shortest first.

    Which rows share a batch decides the last digits of what a model says of them, so models that are compared read the
    same batches. Of equal lengths the earlier row comes first.

    Args:
        lengths: a number a row, or a tuple to sort by several lengths.
        batch_size: most rows of a batch.
    """
    return cut(sorted(range(len(lengths)), key=lambda row: lengths[row]), batch_size)


def cut(items: Sequence[Item], size: int) -> list[list[Item]]:
    """The items in their order, `size` at a time; the last piece may be smaller."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]
