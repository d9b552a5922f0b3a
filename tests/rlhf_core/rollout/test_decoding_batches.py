"""Which rows are decoded together, and where their keys and values lie."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_core.config import ModelConfig
from rlhf_core.engine.batches import SequenceBatch, collate
from rlhf_core.models.policy import build_policy
from rlhf_core.rollout.decoders import make_decoder
from rlhf_core.rollout.sampler import Samples, Sampling, sample_responses
from rlhf_core.rollout.static_decoder import StaticDecoder

VOCABULARY, PAD, NEW = 40, 0, 8
PROMPTS = [[5 + i % 30] * (1 + i % 12) for i in range(96)]
LAYERS, HIDDEN = 2, 32
ROW_BYTES = 2 * LAYERS * HIDDEN * (12 + NEW) * 4  # keys and values, 12 prompt tokens and NEW others, float32


def llama() -> PreTrainedModel:
    cfg = ModelConfig(hidden_size=HIDDEN, heads=2, layers=LAYERS, intermediate_size=32, init_std=0.3)
    return build_policy(cfg, VOCABULARY, PAD, 1, seed=0)


def sample(model: PreTrainedModel, batch_size: int = 96) -> Samples:
    return sample_responses(
        model,
        PROMPTS,
        Sampling(eos_ids=(), pad_id=PAD, max_new_tokens=NEW),
        temperature=1.0,
        generator=torch.Generator().manual_seed(0),
        batch_size=batch_size,
    )


@dataclass
class Decoded:
    """A batch as the decoder gets it: lengths of its different prompts, and rows of each step."""

    lengths: list[int]
    rows: set[int] = field(default_factory=set)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Decoded]:
    """Every batch that is decoded."""
    seen: list[Decoded] = []
    prefill, step = StaticDecoder.prefill, StaticDecoder.step

    def read(decoder: StaticDecoder, batch: SequenceBatch, max_new_tokens: int) -> Tensor:
        seen.append(Decoded(batch.mask_BS.sum(1).tolist()))
        return prefill(decoder, batch, max_new_tokens)

    def go_on(decoder: StaticDecoder, tokens_B: Tensor) -> Tensor:
        seen[-1].rows.add(len(tokens_B))
        return step(decoder, tokens_B)

    monkeypatch.setattr(StaticDecoder, "prefill", read)
    monkeypatch.setattr(StaticDecoder, "step", go_on)
    return seen


@pytest.mark.parametrize(("most", "rows"), [(96, [96]), (50, [48, 48]), (40, [32, 32, 32]), (20, [20] * 4 + [16])])
def test_batches_are_of_nearly_equal_size_and_the_longest_prompts_come_first(
    decoded: list[Decoded], most: int, rows: list[int]
) -> None:
    sample(llama(), batch_size=most)
    assert [batch.rows for batch in decoded] == [{count} for count in rows]
    lengths = [length for batch in decoded for length in batch.lengths]
    assert lengths == sorted(lengths, reverse=True)


def prompts(rows: int, length: int) -> SequenceBatch:
    return collate([[5 + row] * length for row in range(rows)], [[]] * rows, PAD)


def test_keys_and_values_lie_where_those_before_lay() -> None:
    decoder = make_decoder(llama())
    assert isinstance(decoder, StaticDecoder)

    def rooms() -> set[int]:
        return {tensor.untyped_storage().data_ptr() for tensor in (*decoder.keys, *decoder.values)}

    decoder.prefill(prompts(6, 12), NEW)
    (first,) = rooms()
    assert sum(tensor.nbytes for tensor in (*decoder.keys, *decoder.values)) == 6 * ROW_BYTES == decoder.room.nbytes
    decoder.select(torch.tensor([0, 3]))
    assert len(rooms()) == 2 * LAYERS
    assert first not in rooms(), "rows that go on are copied, not moved within their own memory"
    decoder.prefill(prompts(5, 7), NEW)
    assert rooms() == {first}
    decoder.prefill(prompts(7, 12), NEW)
    assert decoder.room.nbytes == 7 * ROW_BYTES


@torch.inference_mode()
def test_what_an_earlier_batch_left_behind_is_never_read() -> None:
    model = llama()
    used, fresh = make_decoder(model), make_decoder(model)
    used.prefill(prompts(6, 12), NEW)
    for tensor in (*used.keys, *used.values):
        tensor.fill_(float("nan"))
    for decoder in (used, fresh):
        decoder.logits = [decoder.prefill(prompts(4, 5), NEW)]
        decoder.logits += [decoder.step(torch.tensor([7, 8, 9, 10])) for _ in range(NEW)]
    for one, other in zip(used.logits, fresh.logits, strict=True):
        assert torch.equal(one, other)
