"""Frozen weights in 8 and 4 bits: what they stand for, that they are one function, and the adapters trained on them.

What needs bitsandbytes (extra `quantised`) is left out, and said to be, where it is not installed.
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.architectures import EOS, PAD, write_folder
from support.ppo import CFG, changed, run
from support.preference import toy_groups
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from rlhf_core.config import DPOConfig, ModelConfig, Params, RewardConfig, SFTConfig
from rlhf_core.data.batching.examples import Example
from rlhf_core.engine.batches import collate
from rlhf_core.engine.packed import can_pack
from rlhf_core.engine.quantised import QuantisedLinear, quantised_layers
from rlhf_core.errors import ConfigError, EnvironmentProblem
from rlhf_core.models.adapters import add_adapters, merged, parameter_counts, without_adapters
from rlhf_core.models.policy import load_policy, save_policy
from rlhf_core.models.quantise import quantise
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.models.scoring.value import ValueModel
from rlhf_core.rollout.decoders import CacheDecoder, make_decoder
from rlhf_core.rollout.logprobs import response_logprobs
from rlhf_core.rollout.sampler import Sampling, sample_responses
from rlhf_core.state.atomic import tree_digest
from rlhf_core.state.compute_mode import ComputeMode, computing
from rlhf_core.state.run_context import RunContext
from rlhf_core.state.train_state import TrainState
from rlhf_core.text.tokenizer import load_tokenizer
from rlhf_core.trainers.optimisation import fresh_state
from rlhf_core.trainers.preference.trainer import train_dpo
from rlhf_core.trainers.reward.trainer import train_reward
from rlhf_core.trainers.sft import train_sft

KINDS = ["int8", "nf4"]
PROMPTS = [[5, 6, 7, 8], [9], list(range(20, 37)), [5, 6, 7, 8]]
RESPONSES = [[12, EOS], [13, 14, 15, 16, 17, 18, 19, EOS], [17], [40, 41, 42, EOS]]
BATCH = collate(PROMPTS, RESPONSES, PAD)
GROUPS = toy_groups(12)
RATE = 3e-3
LORA = {"rank": 4, "alpha": 8}
LEVELS = [
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.5626170, 0.72295684, 1.0,
]  # fmt: skip
"""NF4 of Dettmers et al. 2023, appendix E."""


@pytest.fixture
def library() -> Any:
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes (extra `quantised`) is not installed")


@pytest.fixture(params=["llama 3", "gemma 3", "phi 3"], scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(request.param, tmp_path_factory.mktemp("pretrained"))


def settings(kind: str, **lora: Any) -> ModelConfig:
    return ModelConfig.model_validate(
        {"source": "folder", "path": "models/any", "base_weights": kind, "lora": LORA | lora}
    )


def rounded(folder: Path, kind: str, **lora: Any) -> PreTrainedModel:
    """With adapters that are as they begin."""
    cfg, model = settings(kind, **lora), load_policy(folder)
    quantise(model, cfg, "sft")
    add_adapters(model, cfg.lora_at("sft"), seed=5)
    return model


def trained(model: PreTrainedModel) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def by_hand(weight: Tensor, kind: str) -> Tensor:
    """Rounded to a grid: a row's largest number over 127, or NF4's levels times the largest of 64."""
    if kind == "int8":
        step = weight.abs().amax(1, keepdim=True) / 127
        return (weight / step).round() * step
    blocks = weight.reshape(-1, 64)
    largest, levels = blocks.abs().amax(1, keepdim=True), torch.tensor(LEVELS)
    nearest = ((blocks / largest)[..., None] - levels).abs().argmin(-1)
    return (levels[nearest] * largest).reshape(weight.shape)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("kind", KINDS)
def test_codes_stand_for_the_nearest_numbers_of_their_format(kind: str) -> None:
    layer = nn.Linear(128, 24)
    torch.testing.assert_close(
        QuantisedLinear(layer, kind).weight, by_hand(layer.weight.detach(), kind), atol=1e-7, rtol=1e-5
    )


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_the_product_with_one_weight_and_so_is_its_gradient(kind: str) -> None:
    layer = QuantisedLinear(nn.Linear(64, 24), kind)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = nn.functional.linear(theirs, layer.weight, layer.bias)
    assert torch.equal(layer(ours), expected)
    assert torch.equal(layer(x), expected), "with gradients and without"
    torch.testing.assert_close(layer(x[:1, :1]), expected[:1, :1])
    (layer(ours).square().sum() + expected.square().sum()).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_a_quarter_and_a_seventh_and_parameters_are_counted_as_before(folder: Path, kind: str) -> None:
    layer = QuantisedLinear(nn.Linear(512, 512, bias=False), kind)
    held = sum(tensor.numel() * tensor.element_size() for tensor in layer.parameters())
    assert held / (4 * 512 * 512) == pytest.approx({"int8": 0.252, "nf4": 0.1406}[kind], rel=0.01)
    counted = parameter_counts(rounded(folder, kind))
    assert counted["parameters"] == sum(parameter.numel() for parameter in load_policy(folder).parameters())
    x = torch.randn(8, 512).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    assert not kept, "no whole weight waits for the backward pass"


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_gradients_and_sampling_are_those_of_the_weights_it_stands_for(
    folder: Path, kind: str, dora: bool
) -> None:
    model = trained(rounded(folder, kind, use_dora=dora))
    whole = copy.deepcopy(model)
    for name, layer in list(quantised_layers(whole)):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight, plain.bias = nn.Parameter(layer.weight, requires_grad=False), layer.bias
        parent, _, child = name.rpartition(".")
        setattr(whole.get_submodule(parent), child, plain)
    ours, theirs = response_logprobs(model, BATCH), response_logprobs(whole, BATCH)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    ours.sum().backward()
    theirs.sum().backward()
    gradients = {name: p.grad for name, p in whole.named_parameters() if p.requires_grad}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == gradients.keys()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name], atol=2e-4, rtol=1e-3, msg=name)
    assert (ours - response_logprobs(load_policy(folder), BATCH)).abs().max() > 0.01
    assert isinstance(make_decoder(model), CacheDecoder)
    samples = sample_responses(
        model,
        PROMPTS,
        Sampling(eos_ids=(EOS,), pad_id=PAD, max_new_tokens=12),
        temperature=1.0,
        generator=torch.Generator().manual_seed(2),
        batch_size=8,
    )
    again = response_logprobs(model, collate(PROMPTS, samples.response_ids, PAD))
    for row, logprobs in zip(again, samples.logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(logprobs), row[: len(logprobs)], atol=5e-5, rtol=0)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("targets", [None, ["o_proj"]], ids=["all layers adapted", "some"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_published_is_plain_and_equals_what_was_trained(
    folder: Path, kind: str, targets: list[str] | None, tmp_path: Path
) -> None:
    """In float32 with the rounded base; the adapter alone fits a base that was rounded in the same way."""
    model = trained(rounded(folder, kind, targets=targets))
    tokenizer = load_tokenizer(folder)
    save_policy(model, tokenizer, tmp_path / "one")
    save_policy(model, tokenizer, tmp_path / "two")
    assert tree_digest(tmp_path / "one") == tree_digest(tmp_path / "two")
    stored, before = load_file(tmp_path / "one/model.safetensors"), load_file(folder / "model.safetensors")
    assert stored.keys() == before.keys()
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.float32).eval()
    torch.testing.assert_close(response_logprobs(theirs, BATCH), response_logprobs(model, BATCH), atol=2e-5, rtol=0)
    assert not list(quantised_layers(merged(model)))
    assert len(list(quantised_layers(model))) > 0, "the trained model itself stays as it is"
    fresh = rounded(folder, kind, targets=targets)
    saved = load_file(tmp_path / "one/adapter/adapter_model.safetensors")
    found = {name.removeprefix("base_model.model."): tensor for name, tensor in saved.items()}
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            if "lora_" in name:
                parameter.copy_(found[name.replace(".default", "")])
    assert torch.equal(response_logprobs(fresh, BATCH), response_logprobs(model, BATCH))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_set_aside_leave_the_rounded_model_to_the_bit(folder: Path, kind: str, precision: str) -> None:
    model, base = rounded(folder, kind), load_policy(folder)
    quantise(base, settings(kind), "align")
    assert can_pack(model.get_decoder()) == can_pack(base.get_decoder())
    with computing(ComputeMode(precision=precision)):
        expected = response_logprobs(base, BATCH)
        assert torch.equal(response_logprobs(model, BATCH), expected)
        trained(model)
        assert not torch.equal(response_logprobs(model, BATCH), expected)
        with without_adapters(model), torch.no_grad():
            assert torch.equal(response_logprobs(model, BATCH), expected)


def sft(state: TrainState, log: Any, save: Any) -> TrainState:
    examples = [Example(group.prompt, group.responses[0]) for group in GROUPS]
    cfg = SFTConfig(max_steps=5, batch_size=12, eval_every=9, save_every=1, learning_rate=RATE, warmup_steps=0)
    return train_sft(cfg, state, examples, [], RunContext(seed=0, pad_id=PAD, log=log, checkpoint=save))


def reward(state: TrainState, log: Any, save: Any) -> TrainState:
    cfg = RewardConfig(epochs=2, prompts_per_step=4, warmup_steps=0, save_every=1, learning_rate=RATE)
    return train_reward(cfg, state, GROUPS, RunContext(seed=0, pad_id=PAD, log=log, checkpoint=save)).state


def dpo(state: TrainState, log: Any, save: Any) -> TrainState:
    cfg = DPOConfig(prompts_per_step=4, epochs=2, warmup_steps=0, save_every=1, learning_rate=RATE)
    reference = state.modules["policy"]
    return train_dpo(cfg, state, reference, GROUPS, RunContext(seed=0, pad_id=PAD, log=log, checkpoint=save))


def ppo(state: TrainState, log: Any, save: Any) -> TrainState:
    cfg = changed(CFG, steps=4, rollout_batch=6, minibatch=6, epochs=1, save_every=1, learning_rate=RATE)
    return run(cfg, state, reference=state.modules["policy"], log=log, checkpoint=save)


def body_of(folder: Path, kind: str, make: Callable[[PreTrainedModel], Any]) -> Any:
    """A reward or value model on a rounded body with adapters."""
    policy = load_policy(folder)
    quantise(policy, settings(kind), "reward")
    model = make(policy)
    add_adapters(model.body, settings(kind).lora_at("reward"), seed=6)
    return model


def reward_model(policy: PreTrainedModel) -> RewardModel:
    return RewardModel.from_policy(policy, "gated", seed=2)


def value_model(policy: PreTrainedModel) -> ValueModel:
    return ValueModel.from_reward_model(reward_model(policy))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trainer", ["sft", "reward", "dpo", "ppo"])
def test_every_trainer_learns_on_rounded_weights_and_resumes_with_the_same_bits(
    folder: Path, trainer: str, kind: str, tmp_path: Path
) -> None:
    from rlhf_core.state.checkpoint import Checkpointer

    make = {
        "sft": lambda: fresh_state({"policy": rounded(folder, kind)}, RATE),
        "reward": lambda: fresh_state({"reward": body_of(folder, kind, reward_model)}, RATE),
        "dpo": lambda: fresh_state({"policy": rounded(folder, kind)}, RATE),
        "ppo": lambda: fresh_state(
            {"policy": rounded(folder, kind), "value": body_of(folder, kind, value_model)}, RATE
        ),
    }[trainer]
    train = {"sft": sft, "reward": reward, "dpo": dpo, "ppo": ppo}[trainer]
    unbroken = train(make(), lambda *_: None, lambda _: None)
    keeper = Checkpointer(tmp_path / "kept", {"test": "rounded"})

    def stop(step: int, *_: Any) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(make(), stop, keeper.save)
    state = make()
    assert keeper.restore(state)
    resumed = train(state, lambda *_: None, keeper.save)
    assert resumed.history == unbroken.history
    for name, module in unbroken.modules.items():
        for (key, one), two in zip(module.named_parameters(), resumed.modules[name].parameters(), strict=True):
            assert torch.equal(one, two), key
    kept = {key for path in (tmp_path / "kept").rglob("module-*.safetensors") for key in load_file(path)}
    assert not any(key.endswith(("codes", "scales")) for key in kept), "a checkpoint holds what changes"
    if trainer == "dpo":
        assert unbroken.history[0]["loss/preference"] == torch.tensor(2.0).log().item()
    if trainer != "ppo":
        assert unbroken.history[-1]["loss/train"] < unbroken.history[0]["loss/train"] - 0.01
    if trainer == "ppo":
        assert unbroken.history[0]["policy/ratio_max"] == 1.0


@pytest.mark.usefixtures("library")
def test_a_published_reward_model_scores_as_it_did_in_training(folder: Path, tmp_path: Path) -> None:
    model = body_of(folder, "nf4", reward_model)
    trained(model.body)
    model.save(tmp_path, load_tokenizer(folder))
    torch.testing.assert_close(RewardModel.load(tmp_path)(BATCH), model(BATCH), atol=5e-5, rtol=1e-5)


@pytest.mark.usefixtures("library")
def test_layers_of_another_kind_are_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ConfigError, match=r"base_weights: nf4: GPT2LMHeadModel has layers that are no plain linear"):
        quantise(model, settings("nf4"), "sft")


def test_a_missing_library_is_one_clear_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(EnvironmentProblem, match=r"bitsandbytes is not installed\. Fix: pip install -e '.\[quantised"):
        quantise(load_policy(folder), settings("nf4"), "sft")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"base_weights": "nf4"}}, "a model from scratch trains all of its weights"),
        ({"model": {"base_weights": "nf4", "source": "folder", "path": "m"}}, "sft, reward, align would train all"),
        (
            {"model": {"base_weights": "int8", "source": "folder", "path": "m", "lora": {"stages": ["sft"]}}},
            "reward, align would train all weights",
        ),
        (
            {
                "model": {"base_weights": "int8", "source": "folder", "path": "m", "lora": {}},
                "compute": {"sharding": "fsdp"},
            },
            "rounded weights are not divided among processes",
        ),
    ],
)
def test_what_cannot_be_rounded_is_refused_with_the_cure(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Params.model_validate(values)


def test_without_the_setting_nothing_changes(folder: Path) -> None:
    model = load_policy(folder)
    quantise(model, ModelConfig(), "sft")
    assert not list(quantised_layers(model))
