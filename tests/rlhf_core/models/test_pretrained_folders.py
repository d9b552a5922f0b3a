"""Folders as others save them, by architecture and tokenizer: read, sampled from, trained, written, read again."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.tokenizer import CHATML, LLAMA2, byte_level, sentence_piece
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rlhf_core.config import SFTConfig
from rlhf_core.config.lora import LoraConfig
from rlhf_core.data.batching.examples import Example
from rlhf_core.engine.batches import collate
from rlhf_core.errors import ConfigError
from rlhf_core.models.adapters import add_adapters
from rlhf_core.models.policy import check_room, check_vocabulary, eos_token_ids, load_policy, save_policy
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.rollout.logprobs import response_logprobs
from rlhf_core.rollout.sampler import Sampling, sample_responses
from rlhf_core.state.run_context import RunContext
from rlhf_core.state.train_state import TrainState
from rlhf_core.text.tokenizer import decode_response, encode_prompts, encode_responses, load_tokenizer
from rlhf_core.trainers.optimisation import make_optimizer
from rlhf_core.trainers.sft import accumulate_gradients, train_sft

PROMPTS = ["The price of brooms?", "Aisle?", "A question about the price."]
RESPONSES = ["12.", "An answer, and another one.", "Be kind."]
EXTRA_ROWS = 5  # embeddings beyond the tokenizer's entries, as many models have


def llama(rows: int) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=rows, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False, attention_dropout=0.1,
        )
    )  # fmt: skip


def qwen2(rows: int) -> PreTrainedModel:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=rows, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=False,
        )
    )  # fmt: skip


def gpt2(rows: int) -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=rows, n_embd=16, n_layer=2, n_head=2, n_positions=128))


def neox(rows: int) -> PreTrainedModel:
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=rows, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=128,
        )
    )  # fmt: skip


@dataclass(frozen=True)
class Kind:
    model: Callable[[int], PreTrainedModel]
    tokenizer: Callable[[], PreTrainedTokenizerFast]


KINDS = {
    "llama, sentence pieces, BOS, chat": Kind(llama, lambda: sentence_piece(LLAMA2)),
    "llama, byte level, BOS by post-processor": Kind(llama, lambda: byte_level(bos=True)),
    "qwen2, chat": Kind(qwen2, lambda: byte_level(CHATML)),
    "gpt2, plain, tied": Kind(gpt2, byte_level),
    "gpt-neox, plain": Kind(neox, byte_level),
}


@pytest.fixture(params=KINDS, scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `save_pretrained` of plain transformers wrote."""
    kind, where = KINDS[request.param], tmp_path_factory.mktemp("pretrained")
    tokenizer = kind.tokenizer()
    assert tokenizer.pad_token is None
    tokenizer.save_pretrained(where)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = kind.model(len(tokenizer) + EXTRA_ROWS)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 6]
    model.save_pretrained(where)
    return where


def examples(folder: Path) -> list[Example]:
    tokenizer = load_tokenizer(folder)
    encoded = zip(encode_prompts(tokenizer, PROMPTS, 64), encode_responses(tokenizer, RESPONSES, 32), strict=True)
    return [Example(*row) for row in encoded]


def test_a_folder_is_read_sampled_from_and_scored_alike(folder: Path) -> None:
    model, tokenizer = load_policy(folder), load_tokenizer(folder)
    check_vocabulary(model, tokenizer)
    prompts = encode_prompts(tokenizer, PROMPTS, 64)
    samples = sample_responses(
        model,
        prompts,
        Sampling.of(model, tokenizer, 12),
        temperature=1.0,
        generator=torch.Generator().manual_seed(2),
        batch_size=8,
    )
    logprobs_BR = response_logprobs(model, collate(prompts, samples.response_ids, tokenizer.pad_token_id))
    for row, logprobs in zip(logprobs_BR, samples.logprobs, strict=True):
        torch.testing.assert_close(row[: len(logprobs)], torch.tensor(logprobs), atol=5e-6, rtol=0)
    for ids in samples.response_ids:
        decode_response(tokenizer, [*ids, len(tokenizer) + EXTRA_ROWS - 1])  # an id that no text has


def test_n11_padding_with_the_end_token_changes_nothing(folder: Path) -> None:
    """The end tokens of the responses count, the same ids in padding do not: against rows one by one."""
    rows, tokenizer = examples(folder), load_tokenizer(folder)
    assert tokenizer.pad_token_id in (tokenizer.eos_token_id, load_tokenizer(folder, "plain").eos_token_id)
    together, apart = load_policy(folder).double(), load_policy(folder).double()
    run = RunContext(seed=0, pad_id=tokenizer.eos_token_id)
    loss, _ = accumulate_gradients(together, rows, 1, run)
    one_by_one, _ = accumulate_gradients(apart, rows, len(rows), run)
    assert loss == pytest.approx(one_by_one, rel=1e-10)
    for first, second in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(first.grad, second.grad, atol=1e-10, rtol=1e-7)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["all weights", "lora"])
def test_a_folder_is_trained_written_and_read_again(folder: Path, lora: LoraConfig | None, tmp_path: Path) -> None:
    model, tokenizer, rows = load_policy(folder), load_tokenizer(folder), examples(folder)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    add_adapters(model, lora, seed=0)
    state = TrainState(modules={"policy": model}, optimizers={"policy": make_optimizer(model, 0.02)})
    cfg = SFTConfig(max_steps=8, batch_size=3, warmup_steps=0, learning_rate=0.02)
    pad = tokenizer.pad_token_id
    train_sft(cfg, state, rows, [], RunContext(seed=0, pad_id=pad))
    learned = state.history[0]["loss/train"] - state.history[-1]["loss/train"]
    assert learned > (0.05 if lora else 0.3)  # adapters leave the embeddings alone, where these first steps would gain
    save_policy(model, tokenizer, tmp_path / "out")
    ids = torch.tensor([rows[0].prompt + rows[0].response])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True).eval()
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, atol=1e-4, rtol=0)
    again = load_tokenizer(tmp_path / "out")
    assert [Example(*row) for row in zip(
        encode_prompts(again, PROMPTS, 64), encode_responses(again, RESPONSES, 32), strict=True
    )] == rows  # fmt: skip
    assert eos_token_ids(load_policy(tmp_path / "out"), again) == eos_token_ids(model, tokenizer)


@pytest.mark.parametrize("head", ["last", "gated"])
def test_a_folder_becomes_a_reward_model(folder: Path, head: str, tmp_path: Path) -> None:
    rows, tokenizer = examples(folder), load_tokenizer(folder)
    model = RewardModel.from_policy(load_policy(folder), head, seed=0)
    batch = collate([row.prompt for row in rows], [row.response for row in rows], tokenizer.pad_token_id)
    model.save(tmp_path, tokenizer)
    torch.testing.assert_close(RewardModel.load(tmp_path)(batch), model(batch))


def test_n12_each_of_several_end_tokens_ends_a_response(folder: Path) -> None:
    model, tokenizer = load_policy(folder), load_tokenizer(folder)
    ends = eos_token_ids(model, tokenizer)
    assert {6, tokenizer.eos_token_id} <= set(ends)
    prompts = encode_prompts(tokenizer, PROMPTS * 40, 64)
    samples = sample_responses(
        model,
        prompts,
        Sampling(eos_ids=ends, pad_id=tokenizer.pad_token_id, max_new_tokens=60),
        temperature=1.0,
        generator=torch.Generator().manual_seed(2),
        batch_size=120,
    )
    last = {ids[-1] for ids, finished in zip(samples.response_ids, samples.finished, strict=True) if finished}
    assert last == set(ends)
    assert not any(set(ends) & set(ids[:-1]) for ids in samples.response_ids)


def test_rows_longer_than_the_model_reads_are_refused(folder: Path) -> None:
    model = load_policy(folder)
    check_room(model, 128)
    with pytest.raises(ConfigError, match=r"make 129, this model reads 128\. Fix: smaller limits"):
        check_room(model, 129)
