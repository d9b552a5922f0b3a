"""How many rows go through a model together when nothing is learned: as asked for, or fewer where memory is short.

The process says how much memory such a pass may take (`ComputeMode.pass_bytes`); what a token takes follows from the
model. A batch that would take more is halved until it does not, so that sizes stay those that kernels like, and the
same model, rows and memory give the same batches. Every row gets the same answer but for its last bits, in which
companions show.
"""

import functools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from rlhf_core.engine.packed import can_pack
from rlhf_core.state.compute_mode import compute_mode

FILLED = 0.85
"""Least share of attention's padded places that hold tokens (`layout.LEAST_FILLED`)."""

UNPACKED = 2
"""What a token takes more where transformers' own forward computes it, padding left aside."""

LOGITS_KEPT = 4
"""Tensors of a number a word that drawing a token makes: logits, their float32 form, log-probabilities, their sums."""


def reading_bytes(model: nn.Module) -> int:
    """What a token takes while it is read without gradients; of the hungriest decoder, where there are several.

    Its residual stream three times over, queries, keys, values and attended values in padded rows, and gate and up.
    """
    return max((_reading_bytes(decoder) for decoder in _decoders(model)), default=0)


def cached_bytes(model: nn.Module) -> int:
    """What a place of the key-value cache takes; of all decoders of a mixture, which decode side by side."""
    return sum(_cached_bytes(decoder.config, _number_bytes(decoder)) for decoder in _decoders(model))


def fitting(batches: Iterable[Sequence[int]], row_bytes: Callable[[Sequence[int]], int]) -> list[list[int]]:
    """The batches, each halved until it fits; a single row is never refused.

    Args:
        batches: numbers of rows.
        row_bytes: what each of these rows takes when they go together.
    """
    limit, found = compute_mode().pass_bytes, []
    for batch in batches:
        rows = list(batch)
        size = len(rows)
        while limit is not None and size > 1 and size * row_bytes(rows[:size]) > limit:
            size = -(-size // 2)
        if size < len(rows):
            _tell(len(rows), size)
        found += [rows[start : start + size] for start in range(0, len(rows), size)]
    return found


@functools.cache
def _tell(asked: int, size: int) -> None:
    """Say once that memory cuts batches of so many rows to so many."""
    limit = (compute_mode().pass_bytes or 0) / 1e9
    print(f"memory: {asked} rows go through the model {size} at a time (compute.memory_gb: {limit:.2g})", flush=True)


def fitting_to_read(model: nn.Module, batches: Iterable[Sequence[int]], lengths: Sequence[int]) -> list[list[int]]:
    """`fitting` for rows of so many tokens that are read without gradients."""
    a_token = reading_bytes(model)
    return fitting(batches, lambda rows: a_token * max(lengths[row] for row in rows))


def fitting_to_write(
    model: nn.Module, batches: Iterable[Sequence[int]], prompts: Sequence[Sequence[int]], new_tokens: int
) -> list[list[int]]:
    """`fitting` for prompts that are read, each to be continued by so many tokens."""
    a_token, a_place, words = reading_bytes(model), cached_bytes(model), _words(model)

    def row_bytes(rows: Sequence[int]) -> int:
        width = max(len(prompts[row]) for row in rows)
        return a_token * width + a_place * (width + new_tokens) + 4 * LOGITS_KEPT * words

    return fitting(batches, row_bytes)


def _decoders(model: nn.Module) -> list[PreTrainedModel]:
    """The models of transformers in a module, none within another."""
    if isinstance(model, PreTrainedModel):
        return [model]
    return [decoder for child in model.children() for decoder in _decoders(child)]


def _reading_bytes(model: PreTrainedModel) -> int:
    config, number = model.config.get_text_config(), _number_bytes(model)
    heads, groups, size = _heads(config)
    attention = (2 * heads + 2 * groups) * size / FILLED
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    stream = 3 * config.hidden_size * model.dtype.itemsize
    taken = stream + (attention + 2 * inner) * number
    return int(taken if can_pack(model.get_decoder() or model) else UNPACKED * taken)


def _cached_bytes(config: PreTrainedConfig, number: int) -> int:
    config = config.get_text_config()
    _, groups, size = _heads(config)
    return 2 * config.num_hidden_layers * groups * size * number


def _heads(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Query heads, key-value heads, size of a head."""
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    return heads, groups, getattr(config, "head_dim", None) or config.hidden_size // heads


def _number_bytes(model: PreTrainedModel) -> int:
    """Bytes of a number that products are made of."""
    return torch.bfloat16.itemsize if compute_mode().precision == "bfloat16" else model.dtype.itemsize


def _words(model: nn.Module) -> int:
    return max((decoder.config.get_text_config().vocab_size for decoder in _decoders(model)), default=0)
