"""Low-rank adapters: what they change and what not, the frozen reference under them, and what is written."""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from rlhf_core.config import ModelConfig
from rlhf_core.config.lora import LoraConfig
from rlhf_core.engine.batches import SequenceBatch, collate
from rlhf_core.errors import ConfigError
from rlhf_core.models.adapters import (
    adapted_layers,
    add_adapters,
    has_adapters,
    merged,
    save_adapters,
    without_adapters,
)
from rlhf_core.models.policy import build_policy, load_policy, save_policy
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.models.scoring.value import ValueModel
from rlhf_core.rollout.logprobs import response_logprobs
from rlhf_core.rollout.sampler import Sampling, sample_responses
from rlhf_core.state.atomic import tree_digest
from rlhf_core.state.compute_mode import ComputeMode, computing
from rlhf_core.text.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(["some words to learn from"], 270)
LORA = LoraConfig(rank=2, alpha=4)
KINDS = {
    "lora": LORA,
    "rslora": LoraConfig(rank=2, alpha=4, use_rslora=True),
    "dora": LoraConfig(rank=2, alpha=4, use_dora=True),
    "dora, rslora": LoraConfig(rank=2, alpha=4, use_dora=True, use_rslora=True),
}


def tiny(family: str = "llama") -> PreTrainedModel:
    cfg = ModelConfig(family=family, hidden_size=16, heads=2, layers=2, intermediate_size=24, init_std=0.2)
    return build_policy(cfg, len(TOKENIZER), 0, 1, seed=3)


def gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=len(TOKENIZER), n_embd=16, n_layer=2, n_head=2, n_positions=64,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(3)
    return GPT2LMHeadModel(config).eval()


MODELS = {"llama": tiny, "qwen2": lambda: tiny("qwen2"), "gpt2": gpt2}


def adapted(
    make: Callable[[], PreTrainedModel] = tiny, *, trained: bool = True, cfg: LoraConfig = LORA
) -> PreTrainedModel:
    """A model with adapters; `trained` ones have left zero."""
    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft warns of settings that do not fit and changes them
        add_adapters(model, cfg, seed=5)
    if trained:
        generator = torch.Generator().manual_seed(6)
        with torch.no_grad():
            for _, layer in adapted_layers(model):
                up = layer.lora_B["default"].weight
                up.copy_(torch.randn(up.shape, generator=generator) * 0.3)
                for magnitude in layer.lora_magnitude_vector.values():
                    length = magnitude.weight
                    length.mul_(1 + 0.3 * torch.rand(length.shape, generator=generator))
    return model


def batch() -> SequenceBatch:
    return collate([[5, 6, 7], [9]], [[8, 9, 1], [10, 11, 12, 13, 1]], 0)


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, tensor.detach().clone()) for name, tensor in model.named_parameters())


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_fresh_adapters_change_nothing_and_trained_ones_do(make: Callable[[], PreTrainedModel]) -> None:
    plain = response_logprobs(make(), batch())
    assert torch.equal(response_logprobs(adapted(make, trained=False), batch()), plain)
    assert (response_logprobs(adapted(make), batch()) - plain).abs().max() > 0.01


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_set_aside_the_model_is_the_one_adapters_were_added_to(make: Callable[[], PreTrainedModel]) -> None:
    model = adapted(make)
    before = response_logprobs(model, batch())
    with without_adapters(model):
        assert torch.equal(response_logprobs(model, batch()), response_logprobs(make(), batch()))
    assert torch.equal(response_logprobs(model, batch()), before)
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in model.named_parameters())


def test_set_aside_and_back_even_after_an_error_and_without_adapters_nothing_happens() -> None:
    model = adapted()
    before = response_logprobs(model, batch())
    with pytest.raises(RuntimeError, match="broken off"), without_adapters(model):
        raise RuntimeError("broken off")
    assert torch.equal(response_logprobs(model, batch()), before)
    plain = tiny()
    with without_adapters(plain):
        assert all(parameter.requires_grad for parameter in plain.parameters())


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (MODELS["llama"], {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (MODELS["gpt2"], {"c_attn", "c_proj", "c_fc"}),
    ],
    ids=["llama", "gpt2"],
)
def test_attention_and_mlp_are_adapted_and_the_output_layer_is_not(make: Callable, names: set[str]) -> None:
    model = adapted(make)
    assert {name.rpartition(".")[2] for name, _ in adapted_layers(model)} == names
    assert not any("lora_" in name for name, _ in model.get_output_embeddings().named_parameters())
    assert type(model) is type(make())


def test_named_targets_and_no_others() -> None:
    model = adapted(cfg=LoraConfig(rank=2, targets=("v_proj", "q_proj")))
    assert {name.rpartition(".")[2] for name, _ in adapted_layers(model)} == {"q_proj", "v_proj"}
    with pytest.raises(ConfigError, match=r"targets: the model has no linear layer lm_head, query.*some of down_proj"):
        add_adapters(tiny(), LoraConfig(targets=("query", "lm_head")), 0)


def test_an_adapter_adds_alpha_over_rank_times_b_a() -> None:
    """Worked by hand with matrices: W x + (4 / 2) B A x."""
    model = adapted()
    layer = model.model.layers[1].mlp.up_proj
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(layer(x), x @ layer.base_layer.weight.T + 2.0 * (x @ down.T) @ up.T)


def test_rslora_adds_alpha_over_the_root_of_rank_times_b_a() -> None:
    """Kalajdzievski 2023: W x + (4 / sqrt(2)) B A x."""
    layer = adapted(cfg=KINDS["rslora"]).model.layers[1].mlp.up_proj
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(layer(x), x @ layer.base_layer.weight.T + 8**0.5 * (x @ down.T) @ up.T)


def test_dora_gives_each_row_of_the_weight_a_length_of_its_own() -> None:
    """Liu et al. 2024, eq. 5, by hand; with biases, which no length applies to."""
    layer = adapted(lambda: tiny("qwen2"), cfg=KINDS["dora"]).model.layers[0].self_attn.q_proj
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    directed = layer.base_layer.weight + 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    length = layer.lora_magnitude_vector["default"].weight
    weight = length[:, None] * directed / directed.square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(layer(x), x @ weight.T + layer.base_layer.bias, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("cfg", KINDS.values(), ids=KINDS)
def test_untrained_adapters_change_no_bit_and_trained_ones_much(
    make: Callable[[], PreTrainedModel], cfg: LoraConfig
) -> None:
    plain = response_logprobs(make(), batch())
    assert torch.equal(response_logprobs(adapted(make, trained=False, cfg=cfg), batch()), plain)
    assert (response_logprobs(adapted(make, cfg=cfg), batch()) - plain).abs().max() > 0.01


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("cfg", KINDS.values(), ids=KINDS)
def test_outputs_and_gradients_are_those_of_pefts_own_model(
    make: Callable[[], PreTrainedModel], cfg: LoraConfig
) -> None:
    """A `PeftModel` of the same adapters under transformers' forward, against the engine; as long as peft builds it."""
    import peft

    ours = adapted(make, cfg=cfg)
    theirs = peft.get_peft_model(
        make(),
        peft.LoraConfig(
            r=2,
            lora_alpha=4,
            use_dora=cfg.use_dora,
            use_rslora=cfg.use_rslora,
            target_modules=sorted({name.rpartition(".")[2] for name, _ in adapted_layers(ours)}),
            fan_in_fan_out=make is gpt2,
            task_type="CAUSAL_LM",
        ),
    ).eval()
    learned = {name: tensor for name, tensor in tensors(ours) if "lora_" in name}
    own = {name.removeprefix("base_model.model."): p for name, p in theirs.named_parameters() if p.requires_grad}
    assert learned.keys() == own.keys()
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(learned[name])
    rows = batch()
    logits = theirs(rows.ids_BS, attention_mask=rows.mask_BS, position_ids=rows.position_ids_BS).logits
    predicting = torch.log_softmax(logits[:, rows.prompt_width - 1 : -1], -1)
    expected = predicting.gather(-1, rows.response_ids_BR[..., None])[..., 0] * rows.response_mask_BR
    torch.testing.assert_close(response_logprobs(ours, rows), expected, atol=5e-6, rtol=0)
    (-expected.sum()).backward()
    gradients = adapter_gradients(ours, ComputeMode())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, own[name].grad, atol=2e-5, rtol=1e-4)


def test_in_the_engine_adapters_get_the_gradients_that_peft_gives_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine multiplies with W + scale B A; with every projection called as a module, peft adds scale B (A x)."""
    found = {}
    for name in ("engine", "peft"):
        if name == "peft":
            monkeypatch.setattr("rlhf_core.engine.packed.projection_of", lambda *_: None)
        model = adapted().double()
        logprobs = response_logprobs(model, batch())
        logprobs.sum().backward()
        found[name] = logprobs, {key: one.grad for key, one in model.named_parameters() if one.grad is not None}
    torch.testing.assert_close(found["engine"][0], found["peft"][0], atol=1e-10, rtol=0)
    gradients, expected = found["engine"][1], found["peft"][1]
    assert gradients.keys() == expected.keys()
    assert all("lora_" in key for key in gradients)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key], atol=1e-8, rtol=1e-7, msg=key)


def test_only_adapters_learn_and_the_frozen_weights_keep_their_bits() -> None:
    model = adapted()
    before = dict(tensors(model))
    (-response_logprobs(model, batch()).sum()).backward()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.optim.AdamW(learning, lr=1e-2).step()
    for name, now in tensors(model):
        assert torch.equal(now, before[name]) != ("lora_" in name), name
    with without_adapters(model):
        assert torch.equal(response_logprobs(model, batch()), response_logprobs(tiny(), batch()))


def test_n29_adapters_have_no_dropout() -> None:
    model = adapted().train()
    assert torch.equal(response_logprobs(model, batch()), response_logprobs(model, batch()))
    assert all(isinstance(layer.lora_dropout["default"], nn.Identity) for _, layer in adapted_layers(model))


def test_the_seed_alone_decides_the_adapters_and_leaves_the_random_state() -> None:
    def weights(noise: int, seed: int) -> dict[str, Tensor]:
        model = tiny()
        torch.manual_seed(noise)
        before = torch.random.get_rng_state()
        add_adapters(model, LORA, seed)
        assert torch.equal(before, torch.random.get_rng_state())
        return {name: tensor for name, tensor in tensors(model) if "lora_A" in name}

    first, second, third = weights(1, seed=5), weights(2, seed=5), weights(1, seed=6)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], third[name]) for name in first)
    bound = 16**-0.5
    largest = max(tensor.abs().max().item() for name, tensor in first.items() if "q_proj" in name)
    assert 0.8 * bound < largest <= bound


def adapter_gradients(model: PreTrainedModel, mode: ComputeMode) -> dict[str, Tensor]:
    model.zero_grad()
    with computing(mode):
        (-response_logprobs(model, batch()).sum()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("cfg", KINDS.values(), ids=KINDS)
def test_activation_checkpointing_gives_adapters_the_same_gradient(
    make: Callable[[], PreTrainedModel], cfg: LoraConfig
) -> None:
    model = adapted(make, cfg=cfg)
    plain = adapter_gradients(model, ComputeMode())
    again = adapter_gradients(model, ComputeMode(activation_checkpointing=True))
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("cfg", KINDS.values(), ids=KINDS)
def test_n30_adapters_are_float32_masters_under_bfloat16_products(
    make: Callable[[], PreTrainedModel], cfg: LoraConfig
) -> None:
    model = adapted(make, cfg=cfg)
    plain = response_logprobs(model, batch())
    with computing(ComputeMode(precision="bfloat16")):
        halved = response_logprobs(model, batch())
    assert halved.dtype == torch.float32
    assert 0 < (halved - plain).abs().max() < 0.2
    gradients = adapter_gradients(model, ComputeMode(precision="bfloat16"))
    exact = adapter_gradients(model, ComputeMode())
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert torch.cosine_similarity(gradient.flatten(), exact[name].flatten(), 0) > 0.95, name


def test_no_settings_mean_full_training() -> None:
    model = tiny()
    add_adapters(model, None, 0)
    assert not has_adapters(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("cfg", KINDS.values(), ids=KINDS)
def test_merged_gives_the_same_logprobs_and_leaves_the_original(
    make: Callable[[], PreTrainedModel], cfg: LoraConfig
) -> None:
    model = adapted(make, cfg=cfg)
    before = response_logprobs(model, batch())
    plain = merged(model)
    torch.testing.assert_close(response_logprobs(plain, batch()), before, atol=2e-6, rtol=0)
    assert not has_adapters(plain)
    assert plain.state_dict().keys() == make().state_dict().keys()
    assert torch.equal(response_logprobs(model, batch()), before)
    assert merged(plain) is plain


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("cfg", KINDS.values(), ids=KINDS)
def test_a_saved_folder_is_plain_and_its_adapter_loads_in_peft(
    make: Callable[[], PreTrainedModel], cfg: LoraConfig, tmp_path: Path
) -> None:
    from peft import PeftModel

    model = adapted(make, cfg=cfg)
    save_policy(model, TOKENIZER, tmp_path / "one")
    save_policy(model, TOKENIZER, tmp_path / "two")
    assert tree_digest(tmp_path / "one") == tree_digest(tmp_path / "two")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    expected = model(ids).logits
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "one", local_files_only=True).eval()
    torch.testing.assert_close(plain(ids).logits, expected, atol=1e-5, rtol=0)
    assert not any("lora" in name for name in plain.state_dict())
    again = PeftModel.from_pretrained(make(), tmp_path / "one" / "adapter")
    assert torch.equal(again(ids).logits, expected)


def test_an_adapter_folder_holds_adapters_only_no_path_and_the_same_bytes_in_any_process(tmp_path: Path) -> None:
    save_adapters(adapted(), tmp_path / "here")
    found = load_file(tmp_path / "here/adapter_model.safetensors")
    assert len(found) == 2 * 7 * 2
    assert all(".lora_A.weight" in name or ".lora_B.weight" in name for name in found)
    described = json.loads((tmp_path / "here/adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"], described["base_model_name_or_path"]) == (2, 4, None)
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from test_adapters import adapted, save_adapters; save_adapters(adapted(), sys.argv[1])"
    )
    subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            str(tmp_path / "there"),
            str(Path(__file__).parent),
            str(Path(__file__).parents[3]),
        ],
        check=True,
        env={"PYTHONHASHSEED": "1", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )
    assert tree_digest(tmp_path / "there") == tree_digest(tmp_path / "here")


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("cfg", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("aside", [False, True], ids=["adapted", "set aside"])
def test_what_is_sampled_has_the_logprobs_that_training_computes(make: Callable, cfg: LoraConfig, aside: bool) -> None:
    """The decoder reads weights itself; one that took the frozen weight of an adapted layer would fail here."""
    model = adapted(make, cfg=cfg)
    prompts = [[5, 6, 7], [9], [10, 11]]

    def check() -> list[list[int]]:
        samples = sample_responses(
            model,
            prompts,
            Sampling(eos_ids=(1,), pad_id=0, max_new_tokens=8),
            temperature=1.0,
            generator=torch.Generator().manual_seed(2),
            batch_size=3,
        )
        logprobs_BR = response_logprobs(model, collate(prompts, samples.response_ids, 0))
        for row, logprobs in zip(logprobs_BR, samples.logprobs, strict=True):
            torch.testing.assert_close(row[: len(logprobs)], torch.tensor(logprobs), atol=3e-6, rtol=0)
        return samples.response_ids

    if aside:
        with without_adapters(model):
            written = check()
        assert written != check()
    else:
        check()


@pytest.mark.parametrize("head", ["last", "gated"])
def test_heads_stay_trainable_over_an_adapted_body(head: str, tmp_path: Path) -> None:
    reward = RewardModel.from_policy(tiny(), head, seed=0)
    add_adapters(reward.body, LORA, seed=1)
    value = ValueModel.from_reward_model(RewardModel.from_policy(tiny(), head, seed=0))
    add_adapters(value.body, LORA, seed=1)
    for model in (reward, value):
        outputs = model(batch())
        outputs.sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (not name.startswith("body.") or "lora_" in name), name
    with torch.no_grad():
        for _, layer in adapted_layers(reward.body):
            layer.lora_B["default"].weight.fill_(0.05)
    reward.save(tmp_path / "reward", TOKENIZER)
    assert (tmp_path / "reward/adapter/adapter_model.safetensors").is_file()
    loaded = RewardModel.load(tmp_path / "reward")
    assert not has_adapters(loaded.body)
    torch.testing.assert_close(loaded(batch()), reward(batch()), atol=1e-5, rtol=0)


def test_a_reloaded_merged_folder_can_be_adapted_again(tmp_path: Path) -> None:
    save_policy(adapted(), TOKENIZER, tmp_path / "sft")
    policy = load_policy(tmp_path / "sft")
    before = response_logprobs(policy, batch())
    add_adapters(policy, LORA, seed=9)
    assert torch.equal(response_logprobs(policy, batch()), before)
