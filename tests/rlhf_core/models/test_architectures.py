"""Architectures of today against plain transformers: log-probabilities, gradients, sampling, scores, adapters, folders.

The reference is each row by itself, without padding, sharing or a cache, in eager attention.
"""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from support.architectures import ARCHITECTURES, EOS, PAD, SIZES, random_model, write_folder
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Gemma3TextConfig, PreTrainedModel

from rlhf_core.config.lora import LoraConfig
from rlhf_core.engine.batches import SequenceBatch, collate
from rlhf_core.engine.packed import can_pack
from rlhf_core.errors import ConfigError
from rlhf_core.models.adapters import adapted_layers, add_adapters, merged, without_adapters
from rlhf_core.models.policy import check_room, load_policy, save_policy
from rlhf_core.models.scoring.heads import Head
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.models.scoring.value import ValueModel
from rlhf_core.rollout.decoders import CacheDecoder, make_decoder
from rlhf_core.rollout.logprobs import response_logprobs, response_logprobs_and_entropy
from rlhf_core.rollout.sampler import Sampling, sample_responses
from rlhf_core.rollout.static_decoder import StaticDecoder
from rlhf_core.state.atomic import tree_digest
from rlhf_core.text.tokenizer import load_tokenizer

PROMPTS = [[5, 6, 7, 8], [9], list(range(20, 37)), [5, 6, 7, 8], [12] * 9]
RESPONSES = [[12, EOS], [13, 14, 15, 16, 17, 18, 19, EOS], [17], [40, 41, 42, EOS], [21, 22] * 6]
BATCH = collate(PROMPTS, RESPONSES, PAD)
PACKED = {"llama 3", "mistral", "qwen 3", "smollm 3"}
LOGPROB_NOISE = 2e-5
"""Of float32, in log-probabilities of size 1 to 30."""
ADAPTERS = {
    "all weights": None,
    "lora": LoraConfig(rank=2, alpha=4),
    "dora": LoraConfig(rank=2, alpha=4, use_dora=True),
}


@pytest.fixture(params=ARCHITECTURES, scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(request.param, tmp_path_factory.mktemp("pretrained"))


def plain(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def alone(model: PreTrainedModel, batch: SequenceBatch = BATCH) -> tuple[Tensor, Tensor]:
    """logprobs_BR and states_BCD (see `response_states`) of each row by itself, 0 where there is no token."""
    prompts, responses, _ = batch.shapes
    logprobs, states = [], []
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids = batch.ids_BS[row, batch.prompt_width - prompt : batch.prompt_width + response][None]
        said = model(input_ids=ids, use_cache=False, output_hidden_states=True)
        distributions = torch.log_softmax(said.logits[0, prompt - 1 : -1], -1)
        logprobs.append(distributions.gather(1, ids[0, prompt:, None])[:, 0])
        states.append(said.hidden_states[-1][0, prompt - 1 :])
    stacked = (torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) for rows in (logprobs, states))
    return tuple(stacked)


def trained(policy: PreTrainedModel, lora: LoraConfig) -> PreTrainedModel:
    """With adapters that have left zero."""
    add_adapters(policy, lora, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for _, layer in adapted_layers(policy):
            up = layer.lora_B["default"].weight
            up.copy_(torch.randn(up.shape, generator=generator) * 0.1)
    return policy


def test_logprobs_and_gradients_are_those_of_plain_transformers(folder: Path) -> None:
    ours, theirs = load_policy(folder), plain(folder)
    logprobs_BR, expected_BR = response_logprobs(ours, BATCH), alone(theirs)[0]
    torch.testing.assert_close(logprobs_BR, expected_BR, atol=LOGPROB_NOISE, rtol=0)
    weights_BR = torch.randn(expected_BR.shape, generator=torch.Generator().manual_seed(0))
    (logprobs_BR * weights_BR).sum().backward()
    (expected_BR * weights_BR).sum().backward()
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        largest = other.grad.abs().max().item()
        torch.testing.assert_close(parameter.grad, other.grad, atol=2e-5 * max(1, largest), rtol=1e-4, msg=name)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_which_are_packed_and_decoded_from_their_weights(name: str) -> None:
    model = random_model(name)
    assert can_pack(model.get_decoder()) == (name in PACKED)
    assert isinstance(make_decoder(model), StaticDecoder if name in PACKED else CacheDecoder)


OTHERWISE: dict[str, dict[str, Any]] = {
    "llama 3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
    "smollm 3": {"no_rope_layers": [1, 1, 1, 1]},
    "mistral, sliding": {"sliding_window": None},
    "gemma 3": {"layer_types": ["full_attention"] * 4},
    "phi 3, sliding": {"sliding_window": None},
    "phi 4 mini": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0}},
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_is_special_of_an_architecture_shows_in_these_small_models(name: str) -> None:
    """Were it left out on both sides, the other tests would pass all the same."""
    kind, settings = ARCHITECTURES[name]
    model = random_model(name)
    other = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**(SIZES | settings | OTHERWISE[name]))).eval()
    other.load_state_dict(model.state_dict())
    assert (response_logprobs(model, BATCH) - response_logprobs(other, BATCH)).abs().max() > 0.05


def test_positions_that_depend_on_the_length_of_a_text_are_refused_where_they_begin_to() -> None:
    """Longrope: beyond the length it was first trained at, all positions of all rows of a batch are others."""
    model = random_model("phi 3, longrope")
    short, long = [5, 6, 7, 8], [9] * 60
    together = collate([short, long], [[12, EOS], [13] * 8], PAD)
    assert (alone(model, together)[0] - response_logprobs(model, together))[0].abs().max() > 1e-3
    check_room(model, 64)
    with pytest.raises(ConfigError, match=r"make 65, this model reads 64 before its positions depend on the length"):
        check_room(model, 65)


@pytest.mark.parametrize("more", [{"head": "gated"}, {"head": "last", "keep_output": True}], ids=str)
def test_a_reward_model_reads_no_log_probabilities_where_a_cap_follows_the_states(more: dict[str, Any]) -> None:
    capped = Gemma3TextConfig(**SIZES, **ARCHITECTURES["gemma 3"][1], final_logit_softcapping=20.0)
    model = AutoModelForCausalLM.from_config(capped)
    with pytest.raises(ConfigError, match="those of Gemma3ForCausalLM are not its states times an embedding"):
        RewardModel.from_policy(model, **more, seed=0)
    assert RewardModel.from_policy(model, "last", seed=0).output_weight is None


def test_the_first_log_ratio_is_exactly_zero(folder: Path) -> None:
    policy, reference = load_policy(folder), load_policy(folder)
    with torch.no_grad():
        before_BR = response_logprobs(reference, BATCH)
    assert torch.equal(response_logprobs(policy, BATCH), before_BR)
    assert torch.equal(response_logprobs_and_entropy(policy, BATCH)[0], before_BR)


def test_greedy_sampling_writes_what_generate_writes(folder: Path) -> None:
    policy, theirs = load_policy(folder), plain(folder)
    room = 24
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    written = theirs.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=room, pad_token_id=PAD)
    samples = sample_responses(
        policy,
        PROMPTS,
        Sampling(eos_ids=(EOS,), pad_id=PAD, max_new_tokens=room),
        temperature=0.0,
        generator=torch.Generator(),
        batch_size=3,
    )
    for response, row in zip(samples.response_ids, written[:, width:].tolist(), strict=True):
        ended = row.index(EOS) + 1 if EOS in row else room
        assert response == row[:ended]


@pytest.mark.parametrize(
    "lora",
    [None, LoraConfig(rank=2, alpha=4), LoraConfig(rank=2, alpha=4, use_dora=True)],
    ids=["plain", "lora", "dora"],
)
def test_what_is_sampled_has_the_logprobs_that_training_computes(folder: Path, lora: LoraConfig | None) -> None:
    policy = load_policy(folder) if lora is None else trained(load_policy(folder), lora)
    prompts = [*PROMPTS, *PROMPTS]
    samples = sample_responses(
        policy,
        prompts,
        Sampling(eos_ids=(EOS,), pad_id=PAD, max_new_tokens=20),
        temperature=1.0,
        generator=torch.Generator().manual_seed(2),
        batch_size=8,
    )
    assert max(map(len, samples.response_ids)) > 8
    expected_BR = alone(merged(policy), collate(prompts, samples.response_ids, PAD))[0]
    for row, logprobs in zip(expected_BR, samples.logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(logprobs), row[: len(logprobs)], atol=5e-5, rtol=0)


@pytest.mark.parametrize("head", get_args(Head))
def test_scores_are_the_heads_of_plain_states_and_survive_a_folder(folder: Path, head: str, tmp_path: Path) -> None:
    model = RewardModel.from_policy(load_policy(folder), head, seed=0)
    logprobs_BR, states_BCD = alone(plain(folder))
    expected_B = model.head.combine(model.head(states_BCD, BATCH.response_mask_BR, logprobs_BR))
    torch.testing.assert_close(model(BATCH), expected_B, atol=1e-4, rtol=1e-5)
    model.save(tmp_path, load_tokenizer(folder))
    assert torch.equal(RewardModel.load(tmp_path)(BATCH), model(BATCH))


def test_values_are_read_from_plain_states(folder: Path) -> None:
    value = ValueModel.from_reward_model(RewardModel.from_policy(load_policy(folder), "last", seed=0))
    torch.nn.init.normal_(value.scalar.weight, generator=torch.Generator().manual_seed(0))
    states_BCD = alone(plain(folder))[1]
    expected_BR = value.scalar(states_BCD[:, :-1])[..., 0] * BATCH.response_mask_BR
    torch.testing.assert_close(value(BATCH), expected_BR, atol=1e-4, rtol=0)


def test_adapters_reach_every_linear_layer_and_fold_in(folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    policy = trained(load_policy(folder), LoraConfig(rank=2, alpha=4))
    linear = {name for name, part in load_policy(folder).named_modules() if isinstance(part, torch.nn.Linear)}
    assert {name for name, _ in adapted_layers(policy)} == linear - {"lm_head"}
    logprobs_BR = response_logprobs(policy, BATCH)
    assert (logprobs_BR - response_logprobs(load_policy(folder), BATCH)).abs().max() > 0.01
    save_policy(policy, load_tokenizer(folder), tmp_path / "one")
    save_policy(policy, load_tokenizer(folder), tmp_path / "two")
    assert tree_digest(tmp_path / "one") == tree_digest(tmp_path / "two")
    torch.testing.assert_close(alone(plain(tmp_path / "one"))[0], logprobs_BR, atol=LOGPROB_NOISE, rtol=0)
    theirs = PeftModel.from_pretrained(plain(folder), tmp_path / "one" / "adapter")
    torch.testing.assert_close(alone(theirs)[0], logprobs_BR, atol=LOGPROB_NOISE, rtol=0)
    with without_adapters(policy):
        assert torch.equal(response_logprobs(policy, BATCH), response_logprobs(load_policy(folder), BATCH))


def test_a_folder_is_written_as_it_was_read(folder: Path, tmp_path: Path) -> None:
    save_policy(load_policy(folder), load_tokenizer(folder), tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    torch.testing.assert_close(alone(plain(tmp_path))[0], alone(plain(folder))[0], atol=0, rtol=0)
