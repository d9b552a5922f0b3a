"""Sampling: the distribution, the log-probabilities, the rows' independence."""

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rlhf_core.config import ModelConfig
from rlhf_core.data.batches import collate
from rlhf_core.models.policy import build_policy
from rlhf_core.rollout.decoders import CacheDecoder, StaticDecoder, make_decoder
from rlhf_core.rollout.logprobs import response_logprobs
from rlhf_core.rollout.sampler import Samples, choose_tokens, sample_responses

VOCABULARY, PAD, ENDS = 50, 0, (1, 2, 3, 4)
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15], [16] * 8, [17, 18, 19]]


def tiny(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, initializer_range=0.4, **sizes)).eval()
    if kind == "grouped":
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
            attention_bias=True,
            tie_word_embeddings=False,
        )
        return randomise_biases(LlamaForCausalLM(config).eval())
    cfg = ModelConfig(family=kind, hidden_size=32, heads=2, layers=2, intermediate_size=32, init_std=0.3)
    return randomise_biases(build_policy(cfg, VOCABULARY, PAD, 1, seed=0))


@torch.no_grad()
def randomise_biases(model: PreTrainedModel) -> PreTrainedModel:
    """Biases start at zero, where forgetting one would not show."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
    return model


@pytest.fixture(params=["llama", "qwen2", "grouped", "gpt2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny(request.param)


def sample(model: PreTrainedModel, temperature: float, seed: int = 0, batch_size: int = 4, new: int = 12) -> Samples:
    return sample_responses(
        model,
        PROMPTS,
        max_new_tokens=new,
        temperature=temperature,
        generator=torch.Generator().manual_seed(seed),
        eos_ids=ENDS,
        pad_id=PAD,
        batch_size=batch_size,
    )


def test_the_fast_decoder_serves_llama_and_qwen2_and_the_general_one_the_rest() -> None:
    for kind in ("llama", "qwen2", "grouped"):
        assert isinstance(make_decoder(tiny(kind)), StaticDecoder)
    assert isinstance(make_decoder(tiny("gpt2")), CacheDecoder)
    sliding = tiny("qwen2")
    sliding.config.use_sliding_window = True
    assert isinstance(make_decoder(sliding), CacheDecoder)


def test_greedy_equals_generate_of_transformers(model: PreTrainedModel) -> None:
    found = sample(model, 0.0)
    for prompt, ids in zip(PROMPTS, found.response_ids, strict=True):
        expected = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=list(ENDS), pad_token_id=PAD
        )[0, len(prompt) :]
        assert ids == expected.tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_logprobs_equal_those_that_training_computes(model: PreTrainedModel, temperature: float) -> None:
    """So the first ratio of an update is 1; the bound is what float32 leaves between the two orders of summing."""
    found = sample(model, temperature)
    again = response_logprobs(model, collate(PROMPTS, found.response_ids, PAD), temperature)
    for row, logprobs in enumerate(found.logprobs):
        torch.testing.assert_close(torch.tensor(logprobs), again[row, : len(logprobs)], atol=3e-5, rtol=0)


def test_greedy_logprobs_are_those_at_temperature_1(model: PreTrainedModel) -> None:
    found = sample(model, 0.0)
    again = response_logprobs(model, collate(PROMPTS, found.response_ids, PAD))
    for row, logprobs in enumerate(found.logprobs):
        torch.testing.assert_close(torch.tensor(logprobs), again[row, : len(logprobs)], atol=3e-5, rtol=0)


def test_responses_end_at_the_first_end_token_or_at_the_limit(model: PreTrainedModel) -> None:
    found = sample(model, 1.0, new=30)
    assert any(found.finished)
    for ids, logprobs, finished in zip(found.response_ids, found.logprobs, found.finished, strict=True):
        assert len(ids) == len(logprobs)
        assert not set(ids[:-1]) & set(ENDS)
        assert finished == (ids[-1] in ENDS)
        assert finished or len(ids) == 30
    short = sample(model, 1.0, new=1)
    assert [len(ids) for ids in short.response_ids] == [1] * len(PROMPTS)


def test_a_row_does_not_depend_on_its_batch(model: PreTrainedModel) -> None:
    """Rows draw their own numbers, so neither batch size nor rows that end early move any other row's response."""
    one, all_at_once = sample(model, 1.0, batch_size=1), sample(model, 1.0, batch_size=6)
    assert one.response_ids == all_at_once.response_ids
    assert one.finished == all_at_once.finished


def test_the_generator_decides(model: PreTrainedModel) -> None:
    assert sample(model, 1.0, seed=5) == sample(model, 1.0, seed=5)
    assert sample(model, 1.0, seed=5).response_ids != sample(model, 1.0, seed=6).response_ids


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_come_as_often_as_their_probability_says(temperature: float) -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    draws = 40_000
    uniform = torch.rand(draws, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = choose_tokens(probabilities.log().expand(draws, 4), temperature, uniform)
    expected = probabilities ** (1 / temperature)
    expected = expected / expected.sum()
    shares = torch.bincount(tokens, minlength=4) / draws
    torch.testing.assert_close(shares, expected, atol=4 * 0.5 / math.sqrt(draws), rtol=0)
    assert shares[1] == 0.0
    torch.testing.assert_close(logprobs, expected.log()[tokens])


def test_the_ends_of_the_uniform_interval_find_a_possible_token() -> None:
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]]).expand(2, 4)
    tokens, _ = choose_tokens(logits, 1.0, torch.tensor([0.0, 1.0 - 2**-24]))
    assert tokens.tolist() == [1, 2]


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        sample(tiny("llama"), 1.0, new=0)
    with pytest.raises(ValueError, match="at least 0"):
        sample(tiny("llama"), -1.0)


def test_no_prompts_give_no_responses() -> None:
    found = sample_responses(
        tiny("llama"),
        [],
        max_new_tokens=3,
        temperature=1.0,
        generator=torch.Generator(),
        eos_ids=ENDS,
        pad_id=PAD,
        batch_size=4,
    )
    assert found == Samples(response_ids=[], logprobs=[], finished=[])
