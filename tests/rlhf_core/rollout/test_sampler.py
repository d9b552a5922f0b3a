"""Sampling: the distribution, the log-probabilities, the rows' independence."""

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rlhf_core.config import ModelConfig
from rlhf_core.engine.batches import SequenceBatch, collate
from rlhf_core.models.policy import build_policy
from rlhf_core.rollout.decoders import CacheDecoder, Decoder, make_decoder
from rlhf_core.rollout.logprobs import response_logprobs
from rlhf_core.rollout.sampler import Samples, Sampling, sample_responses, sample_rows
from rlhf_core.rollout.static_decoder import StaticDecoder
from rlhf_core.rollout.token_draw import OPEN, CutOff
from rlhf_core.state.compute_mode import ComputeMode, computing

VOCABULARY, PAD, ENDS = 50, 0, (1, 2, 3, 4)
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15], [16] * 8, [17, 18, 19]]


def tiny(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, initializer_range=0.4, **sizes)).eval()
    if kind in ("grouped", "llama3"):
        scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        far = {"rope_type": "llama3", "original_max_position_embeddings": 16, "rope_theta": 1e4, **scaling}
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
            rope_parameters=far if kind == "llama3" else None,
        )
        return randomise(LlamaForCausalLM(config).eval())
    cfg = ModelConfig(family=kind, hidden_size=32, heads=2, layers=2, intermediate_size=32, init_std=0.3)
    return randomise(build_policy(cfg, VOCABULARY, PAD, 1, seed=0))


@torch.no_grad()
def randomise(model: PreTrainedModel) -> PreTrainedModel:
    """Biases start at zero and norms at one, where forgetting one would not show."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
        if "norm" in name:
            parameter.uniform_(0.5, 1.5)
    return model


@pytest.fixture(params=["llama", "qwen2", "grouped", "llama3", "gpt2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny(request.param)


def sample(
    model: PreTrainedModel,
    temperature: float | list[float],
    seed: int = 0,
    batch_size: int = 4,
    new: int = 12,
    prompts: list[list[int]] = PROMPTS,
    cut_off: CutOff = OPEN,
) -> Samples:
    return sample_responses(
        model,
        prompts,
        Sampling(eos_ids=ENDS, pad_id=PAD, max_new_tokens=new),
        temperature=temperature,
        generator=torch.Generator().manual_seed(seed),
        batch_size=batch_size,
        cut_off=cut_off,
    )


def test_the_fast_decoder_serves_what_is_packed_and_the_general_one_the_rest() -> None:
    for kind in ("llama", "qwen2", "grouped", "llama3"):
        assert isinstance(make_decoder(tiny(kind)), StaticDecoder)
    assert isinstance(make_decoder(tiny("gpt2")), CacheDecoder)
    stretched = tiny("llama")
    stretched.config.rope_parameters["rope_type"] = "dynamic"  # its angles depend on the length of the text
    assert isinstance(make_decoder(stretched), CacheDecoder)
    activated = tiny("llama")
    activated.config.hidden_act = "gelu"
    assert isinstance(make_decoder(activated), CacheDecoder)


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


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_n04_logprobs_of_an_ordinary_model_are_within_1e_5_of_training(family: str) -> None:
    """At the initial scale of a real model, 200 tokens; the models above have far larger logits."""
    cfg = ModelConfig(family=family, hidden_size=64, heads=4, layers=3, intermediate_size=128, init_std=0.05)
    model = build_policy(cfg, 500, PAD, 1, seed=0)
    found = sample(model, 1.0, new=40)
    again = response_logprobs(model, collate(PROMPTS, found.response_ids, PAD))
    for row, logprobs in enumerate(found.logprobs):
        torch.testing.assert_close(torch.tensor(logprobs), again[row, : len(logprobs)], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "grouped", "gpt2"])
def test_n42_in_bfloat16_what_is_sampled_stays_near_what_training_computes(kind: str) -> None:
    """As near as two orders of rounding to 8 bits leave it: about as far as either is from float32."""
    model = tiny(kind)
    with computing(ComputeMode(precision="bfloat16")):
        found = sample(model, 1.0)
        again = response_logprobs(model, collate(PROMPTS, found.response_ids, PAD))
    exact = response_logprobs(model, collate(PROMPTS, found.response_ids, PAD))
    assert again.dtype == torch.float32
    rows = list(enumerate(map(torch.tensor, found.logprobs)))
    near = torch.cat([logprobs - again[row, : len(logprobs)] for row, logprobs in rows]).abs()
    far = torch.cat([logprobs - exact[row, : len(logprobs)] for row, logprobs in rows]).abs()
    assert near.mean() < 0.05
    assert far.max() > 1e-4, "float32 was computed"


def test_in_bfloat16_cache_and_products_are_narrow_and_the_residual_stream_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: set[torch.dtype] = set()
    norm = StaticDecoder._norm

    def noted(self: StaticDecoder, x_ND: Tensor) -> Tensor:
        seen.add(x_ND.dtype)
        return norm(self, x_ND)

    monkeypatch.setattr(StaticDecoder, "_norm", noted)
    with computing(ComputeMode(precision="bfloat16")), torch.inference_mode():
        decoder = StaticDecoder(tiny("llama"))
        decoder.prefill(collate(PROMPTS, [[]] * len(PROMPTS), PAD), 2)
        decoder.step(torch.full((len(PROMPTS),), 5))
    assert {tensor.dtype for tensor in (*decoder.keys, *decoder.values)} == {torch.bfloat16}
    assert {layer.qkv.dtype for layer in decoder.layers} == {torch.bfloat16}
    assert seen == {torch.float32}


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


def test_finished_rows_leave_and_move_nothing(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[5 + row, 6, 7 + row % 3] for row in range(40)]
    temperatures = [1.0, 0.7, 1.4, 1.0] * 10
    one_by_one = sample(model, temperatures, prompts=prompts, batch_size=1, new=24)
    decoder, left = type(make_decoder(model)), []
    select = decoder.select

    def counted(self: Decoder, rows: Tensor) -> None:
        left.append(len(rows))
        select(self, rows)

    monkeypatch.setattr(decoder, "select", counted)
    together = sample(model, temperatures, prompts=prompts, batch_size=40, new=24)
    assert together.response_ids == one_by_one.response_ids
    assert len(left) > 1
    assert left == sorted(left, reverse=True)
    assert all(count % 8 == 0 for count in left)


def test_the_generator_decides(model: PreTrainedModel) -> None:
    assert sample(model, 1.0, seed=5) == sample(model, 1.0, seed=5)
    assert sample(model, 1.0, seed=5).response_ids != sample(model, 1.0, seed=6).response_ids


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        sample(tiny("llama"), 1.0, new=0)
    with pytest.raises(ValueError, match="at least 0"):
        sample(tiny("llama"), -1.0)
    five = Sampling(eos_ids=ENDS, pad_id=PAD, max_new_tokens=5)
    with pytest.raises(ValueError, match=r"\(2, 4\) random numbers for 2 responses of at most 5"):
        sample_rows(tiny("llama"), PROMPTS[:2], torch.rand(2, 4), five, temperature=1.0, batch_size=2)


def test_no_prompts_give_no_responses() -> None:
    found = sample_responses(
        tiny("llama"),
        [],
        Sampling(eos_ids=ENDS, pad_id=PAD, max_new_tokens=3),
        temperature=1.0,
        generator=torch.Generator(),
        batch_size=4,
    )
    assert found == Samples(response_ids=[], logprobs=[], behaviour_logprobs=[], finished=[])


def test_several_temperatures_in_one_call(model: PreTrainedModel) -> None:
    mixed = sample(model, [0.0, 1.0, 0.5, 0.0, 1.0, 0.5])
    for place, temperature in enumerate((0.0, 1.0, 0.5)):
        alone = sample(model, temperature)
        for row in (place, place + 3):
            assert mixed.response_ids[row] == alone.response_ids[row]
            assert mixed.logprobs[row] == pytest.approx(alone.logprobs[row], abs=1e-5)
    with pytest.raises(ValueError, match="one for each prompt"):
        sample(model, [1.0])


def test_a_prompt_that_comes_several_times_is_read_once(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its responses are those it would have got on its own, each from its own numbers."""
    decoder, read = type(make_decoder(model)), []
    prefill = decoder.prefill

    def counted(self: Decoder, prompts: SequenceBatch, max_new_tokens: int) -> Tensor:
        read.append(len(prompts.ids_BS))
        return prefill(self, prompts, max_new_tokens)

    one_by_one = sample(model, 1.0, prompts=[*PROMPTS, *PROMPTS[:2], *PROMPTS], batch_size=1)
    monkeypatch.setattr(decoder, "prefill", counted)
    together = sample(model, 1.0, prompts=[*PROMPTS, *PROMPTS[:2], *PROMPTS], batch_size=20)
    assert read == [len(PROMPTS)]
    assert together.response_ids == one_by_one.response_ids
    assert len({tuple(together.response_ids[row]) for row in (0, 6, 8)}) > 1


def test_n02_behaviour_logprobs_are_those_of_the_cut_off_distribution(model: PreTrainedModel) -> None:
    """The plain ones stay what training computes; the others are larger by the share of what was kept."""
    temperature, cut_off = 0.8, CutOff(top_k=10, top_p=0.7)
    found = sample(model, temperature, cut_off=cut_off)
    for prompt, ids, plain, behaviour in zip(
        PROMPTS, found.response_ids, found.logprobs, found.behaviour_logprobs, strict=True
    ):
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].detach() / temperature
        kept = TopPLogitsWarper(0.7)(None, TopKLogitsWarper(10)(None, logits))
        chosen = torch.tensor(ids)[:, None]
        expected = kept.log_softmax(-1).gather(1, chosen)[:, 0]
        torch.testing.assert_close(torch.tensor(behaviour), expected, atol=3e-5, rtol=0)
        whole = logits.log_softmax(-1).gather(1, chosen)[:, 0]
        torch.testing.assert_close(torch.tensor(plain), whole, atol=3e-5, rtol=0)


def test_n11_padding_may_be_an_end_token(model: PreTrainedModel) -> None:
    """Padding stands before prompts, where the mask hides it, and is never looked for in a response."""
    plain = sample(model, 1.0)
    same = sample_responses(
        model,
        PROMPTS,
        Sampling(eos_ids=ENDS, pad_id=ENDS[0], max_new_tokens=12),
        temperature=1.0,
        generator=torch.Generator().manual_seed(0),
        batch_size=4,
    )
    assert same == plain


def adapted(kind: str) -> PreTrainedModel:
    """A model with two adapters on every linear layer, one of them active, that change what it writes."""
    torch.manual_seed(1)
    model = tiny(kind)
    for name, layers in (("one", ["q_proj", "o_proj", "down_proj"]), ("two", ["v_proj", "gate_proj", "up_proj"])):
        model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=layers, lora_dropout=0.5), adapter_name=name)
    model.set_adapter(["one", "two"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model.eval()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "grouped"])
def test_adapters_count_as_in_the_models_own_forward(kind: str) -> None:
    model = adapted(kind)
    seen = []
    for change in (lambda: None, lambda: model.set_adapter("one"), model.disable_adapters, model.enable_adapters):
        change()
        assert isinstance(make_decoder(model), StaticDecoder)
        found = sample(model, 1.0)
        again = response_logprobs(model, collate(PROMPTS, found.response_ids, PAD))
        for row, logprobs in enumerate(found.logprobs):
            torch.testing.assert_close(torch.tensor(logprobs), again[row, : len(logprobs)], atol=1e-4, rtol=0)
        seen.append(found.response_ids)
    assert seen[0] != seen[1] != seen[2], "the adapters change what is written"


def test_layers_that_are_not_plain_products_go_to_the_general_decoder() -> None:
    model = tiny("llama")
    model.add_adapter(LoraConfig(r=2, target_modules=["down_proj"], alora_invocation_tokens=[5]))
    assert isinstance(make_decoder(model), CacheDecoder)
    model = tiny("llama")
    model.model.layers[0].mlp.up_proj = torch.nn.Sequential(model.model.layers[0].mlp.up_proj)
    assert isinstance(make_decoder(model), CacheDecoder)
