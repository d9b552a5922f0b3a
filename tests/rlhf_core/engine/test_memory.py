"""What reading and writing without gradients take, against counted tensors; batches that are cut say the same."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from support.architectures import random_model
from support.memory import Memory
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rlhf_core.engine import memory
from rlhf_core.engine.batches import by_length, collate
from rlhf_core.engine.memory import cached_bytes, fitting, fitting_to_read, fitting_to_write, reading_bytes
from rlhf_core.engine.states import final_states
from rlhf_core.evaluation import response_scores
from rlhf_core.evaluation.policy_measurement import response_logprob_sums
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.rollout import sampler
from rlhf_core.rollout.sampler import Sampling, sample_responses
from rlhf_core.state.compute_mode import ComputeMode, compute_mode, computing

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def limited(pass_bytes: int | None, **others: int) -> ComputeMode:
    return replace(compute_mode(), pass_bytes=pass_bytes, **others)


def test_bytes_of_a_token_by_hand(model: PreTrainedModel) -> None:
    """Stream 3 x 64; heads (2 x 4 + 2 x 2) x 16 in rows filled to 0.85; gate and up 2 x 128; four bytes each."""
    assert reading_bytes(model) == int(4 * (3 * 64 + 12 * 16 / 0.85 + 2 * 128))
    assert cached_bytes(model) == 2 * 3 * 2 * 16 * 4  # keys and values of 3 layers, 2 heads of 16, four bytes
    with computing(replace(compute_mode(), precision="bfloat16")):
        assert cached_bytes(model) == 2 * 3 * 2 * 16 * 2
    reward = RewardModel.from_policy(model, "last", 0)
    assert reading_bytes(reward) == reading_bytes(model)
    assert cached_bytes(nn.ModuleList([model, deepcopy(model)])) == 2 * cached_bytes(model)
    assert reading_bytes(nn.Linear(1, 1)) == 0


@pytest.mark.parametrize("rows", [32, 64])
def test_what_reading_takes_is_what_was_reckoned(model: PreTrainedModel, rows: int) -> None:
    """The peak of all tensors of a pass, counted, against bytes a token times tokens: within a fifth."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 300, (rows, 60), generator=generator).tolist()
    batch = collate([row[:40] for row in ids], [row[40:] for row in ids], 0)
    with torch.no_grad(), Memory() as counted:
        final_states(model.get_decoder(), batch)
    assert counted.peak == pytest.approx(reading_bytes(model) * rows * 60, rel=0.2)


def test_batches_are_halved_until_they_fit_and_a_row_is_never_refused(capsys: pytest.CaptureFixture[str]) -> None:
    memory._tell.cache_clear()
    with computing(limited(100)):
        assert fitting([[0, 1, 2, 3, 4], [5]], lambda rows: 10) == [[0, 1, 2, 3, 4], [5]]
        assert fitting([[0, 1, 2, 3, 4], [5]], lambda rows: 40) == [[0, 1], [2, 3], [4], [5]]
        assert fitting([[0, 1, 2]], lambda rows: 1000) == [[0], [1], [2]]
        assert fitting([[0, 1, 2]], lambda rows: 1000) == [[0], [1], [2]]
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "memory: 5 rows go through the model 2 at a time (compute.memory_gb: 1e-07)",
        "memory: 3 rows go through the model 1 at a time (compute.memory_gb: 1e-07)",
    ]
    with computing(limited(None)):
        assert fitting([[0, 1, 2]], lambda rows: 10**15) == [[0, 1, 2]]


def test_short_rows_go_together_where_long_ones_do_not(model: PreTrainedModel) -> None:
    lengths = [10, 10, 10, 10, 100, 100, 100, 100]
    with computing(limited(200 * reading_bytes(model))):
        assert fitting_to_read(model, by_length(lengths, 4), lengths) == [[0, 1, 2, 3], [4, 5], [6, 7]]
        prompts = [[1] * length for length in lengths]
        found = fitting_to_write(model, [[4, 5, 6, 7], [0, 1, 2, 3]], prompts, 10)
    assert [row for rows in found for row in rows] == [4, 5, 6, 7, 0, 1, 2, 3]
    assert max(map(len, found)) == len(found[-1]) > len(found[0])


def test_a_cut_batch_says_what_the_whole_one_says(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[5, 6, 7], [8] * 9, [9, 10], [11] * 30, [12, 13], [14] * 5]
    sampling = Sampling(eos_ids=(0,), pad_id=0, max_new_tokens=12)
    seen: list[int] = []

    def everything() -> tuple[list[list[int]], list[float]]:
        seen.clear()
        generator = torch.Generator().manual_seed(3)
        written = sample_responses(model, prompts, sampling, temperature=1.0, generator=generator, batch_size=6)
        sums = response_logprob_sums(model, prompts, written.response_ids, pad_id=0)
        return written.response_ids, sums.tolist()

    monkeypatch.setattr(sampler, "fitting_to_write", lambda *args: watched(memory.fitting_to_write, seen, *args))
    monkeypatch.setattr(response_scores, "fitting_to_read", lambda *args: watched(memory.fitting_to_read, seen, *args))
    whole = everything()
    assert seen == [6, 6]
    with computing(limited(60 * reading_bytes(model))):
        cut = everything()
    assert len(seen) > 4
    with computing(limited(None, sampled_rows=2, scored_rows=3)):
        asked = everything()
    assert seen == [2, 2, 2, 3, 3]
    for found in (cut, asked):
        assert found[0] == whole[0]
        assert found[1] == pytest.approx(whole[1], abs=1e-4)


def watched(function: object, seen: list[int], *args: object) -> list[list[int]]:
    found = function(*args)
    seen.extend(map(len, found))
    return found


@pytest.mark.parametrize("name", ["gemma 3", "olmo 2", "phi 3"])
def test_models_that_transformers_computes_are_reckoned_with_too(name: str) -> None:
    assert reading_bytes(random_model(name)) > 0
    assert cached_bytes(random_model(name)) > 0
