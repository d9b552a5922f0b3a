"""Folders that are not whole, or hold what is no trainable decoder: refused before a run, tensors named.

Each kind is made from a good folder by what goes wrong with folders: cut copies, clones without their large files,
weights of another model, quantised models, encoders.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tokenizer import CHATML, byte_level
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
)

from rlhf_core.errors import ConfigError, EnvironmentProblem, RlhfError
from rlhf_core.models.checks import check_policy_folder, check_reward_folder
from rlhf_core.models.folders import direction
from rlhf_core.models.folders.architecture import outline, read_config
from rlhf_core.models.folders.direction import check_direction
from rlhf_core.models.policy import load_policy
from rlhf_core.models.scoring.ensemble import RewardEnsemble, load_reward_model
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.text.tokenizer import load_tokenizer

WEIGHTS = "model.safetensors"
DOWN = "model.layers.1.mlp.down_proj.weight"
TOKENIZER = byte_level(CHATML)
ROWS = len(TOKENIZER) + 5
SIZES = {
    "vocab_size": ROWS, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 128,
}  # fmt: skip
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 4942000000\n"


def write(folder: Path, config: PretrainedConfig, **how: object) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder, **how)
    TOKENIZER.save_pretrained(folder)
    return folder


def llama(**more: object) -> LlamaConfig:
    return LlamaConfig(**SIZES, **more)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("good") / "model", llama())


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


def check(folder: Path) -> None:
    check_policy_folder(folder, "auto", 128)


def refusal(folder: Path, asked: Callable[[Path], object] = check) -> str:
    """The line of a refusal that a person can act on (exit code 2), the folder's own path left out."""
    with pytest.raises(RlhfError) as caught:
        asked(folder)
    line = str(caught.value)
    assert "\n" not in line
    assert " Fix: " in line
    assert isinstance(caught.value, ConfigError)
    return line.replace(str(folder), "FOLDER")


def with_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def with_json(folder: Path, name: str, change: Callable[[dict], object]) -> Path:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(DOWN), rf"LlamaForCausalLM: 1 missing: {DOWN}\. Fix"),
        (lambda t: t.update(extra=torch.ones(2)), "1 not part of it: extra. Fix"),
        (
            lambda t: t.update({DOWN: torch.ones(16, 23)}),
            rf"1 of another shape: {DOWN} \(16, 23\) instead of \(16, 24\)",
        ),
        (lambda t: t.update({DOWN: t[DOWN].to(torch.int8)}), f"{DOWN}: numbers of type I8: quantised"),
        (lambda t: t.update({DOWN: t[DOWN].to(torch.float8_e4m3fn)}), f"{DOWN}: numbers of type F8_E4M3: quantised"),
        (lambda t: (t.pop("lm_head.weight"), t.pop(DOWN)), f"2 missing: lm_head.weight, {DOWN}"),
        (lambda t: [t.pop(name) for name in list(t) if "layers.1" in name], "9 missing: .* and 1 more"),
    ],
)
def test_tensors_that_are_missing_or_wrong_are_named(folder: Path, change: Callable, words: str) -> None:
    with_tensors(folder, change)
    said = refusal(folder)
    with pytest.raises(ConfigError, match=words):
        check(folder)
    assert refusal(folder, load_policy) == said, "a stage that is started alone says the same"


@pytest.mark.parametrize(
    ("number", "dtype"),
    [
        (float("nan"), torch.float32),
        (float("inf"), torch.float32),
        (float("-inf"), torch.bfloat16),
        (float("nan"), torch.float16),
        (1e300, torch.float64),  # a number there, and infinite as the model is trained
    ],
)
@pytest.mark.parametrize("asked", [check, load_policy])
def test_a_tensor_with_one_number_that_is_none_is_named(
    folder: Path, number: float, dtype: torch.dtype, asked: Callable[[Path], object]
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[DOWN] = tensors[DOWN].to(dtype)
        tensors[DOWN][7, 5] = number

    with_tensors(folder, spoil)
    assert f": 1 tensors with NaN or infinity: {DOWN}. Fix: copy the folder again" in refusal(folder, asked)


def test_every_spoilt_tensor_of_all_shards_is_named(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
        spoilt = ["model.embed_tokens.weight", "model.norm.weight"]
        for name in spoilt:
            model.get_parameter(name).data.flatten()[-1] = float("nan")
        model.save_pretrained(tmp_path, max_shard_size="8KB")
    TOKENIZER.save_pretrained(tmp_path)
    assert not (tmp_path / WEIGHTS).exists()
    assert refusal(tmp_path).startswith(f"FOLDER: 2 tensors with NaN or infinity: {', '.join(spoilt)}. Fix: ")


def test_a_mask_that_older_programs_saved_may_be_infinite_and_a_weight_without_the_prefix_may_not(
    tmp_path: Path,
) -> None:
    """GPT-2 as its makers published it: names without `transformer.`, and each layer's mask among the tensors."""
    sizes = {"vocab_size": ROWS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128}
    folder = write(tmp_path, GPT2Config(**sizes))
    named = {name.removeprefix("transformer."): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    mask = torch.full((1, 1, 8, 8), float("-inf"))
    save_file(named | {"h.0.attn.bias": mask}, folder / WEIGHTS, metadata={"format": "pt"})
    check(folder)
    named["h.1.mlp.c_fc.weight"][0, 0] = float("nan")
    save_file(named | {"h.0.attn.bias": mask}, folder / WEIGHTS, metadata={"format": "pt"})
    assert "1 tensors with NaN or infinity: h.1.mlp.c_fc.weight." in refusal(folder)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_pointer_in_place_of_a_file_is_told_from_the_file(folder: Path, name: str) -> None:
    (folder / name).write_text(POINTER)
    assert refusal(folder).startswith(f"FOLDER: {name}: a pointer of git-lfs and not the file itself. Fix: `git lfs")


@pytest.mark.parametrize("keep", [0, 4, 700, -1])
def test_a_file_of_weights_that_was_cut_is_refused(folder: Path, keep: int) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:keep])
    assert WEIGHTS in refusal(folder)
    assert ("empty" if keep == 0 else "cut or damaged") in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_file_of_text_that_was_cut_is_refused(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    assert "FOLDER" in refusal(folder)


def test_a_quantised_model_is_refused_by_its_configuration(folder: Path) -> None:
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    with_json(folder, "config.json", lambda c: c.update(quantization_config=gptq))
    assert "config.json: quantization_config: a model quantised by gptq" in refusal(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "unheard-of"}, "transformers cannot use it"),
        ({"model_type": None}, "transformers cannot use it"),
        ({"model_type": "t5"}, "is_encoder_decoder: t5 has an encoder"),
        ({"model_type": "vit"}, "model_type: vit is not known as a causal language model"),
        ({"hidden_act": "no-such"}, "no LlamaForCausalLM can be made of it"),
        ({"num_attention_heads": 3}, "FOLDER"),
        ({"hidden_size": 32}, "of another shape: "),
        ({"num_hidden_layers": 4}, "9 missing: model.layers.3"),
        ({"num_hidden_layers": 2}, "9 not part of it: model.layers.2"),
        ({"vocab_size": ROWS + 1}, "of another shape: lm_head.weight"),
    ],
)
def test_a_configuration_that_is_of_another_model_is_refused(folder: Path, change: dict, words: str) -> None:
    with_json(folder, "config.json", lambda c: c.update(change))
    assert words in refusal(folder)


def test_a_tensor_under_two_names_is_refused(folder: Path) -> None:
    """transformers takes either, with its prefix or without, and one of two in silence."""
    with_tensors(folder, lambda t: t.update({"norm.weight": t["model.norm.weight"] + 1}))
    assert "FOLDER: norm.weight: there with model. before the name, too. Fix: copy" in refusal(folder)
    assert "FOLDER: norm.weight: there with model. before the name, too" in refusal(folder, load_policy)


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": float("nan")},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 0.0, "rope_theta": 10000.0}},
    ],
)
def test_a_configuration_that_makes_numbers_which_are_none_is_refused_as_that(folder: Path, change: dict) -> None:
    with_json(folder, "config.json", lambda c: c.update(change))
    assert "LlamaForCausalLM: its configuration makes numbers that are not finite" in refusal(folder)


@pytest.mark.parametrize("end", ["x", [2, "x"], [-1], True, 1.5])
def test_an_end_token_that_is_no_number_is_refused_before_the_run(folder: Path, end: object) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    assert "FOLDER/generation_config.json: eos_token_id: " in refusal(folder)


def test_a_file_in_place_of_a_folder_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(EnvironmentProblem, match=r"model\.gguf: a file and no folder\. Fix: "):
        check(tmp_path / "model.gguf")


def test_a_hole_in_the_vocabulary_is_found_by_its_largest_number(folder: Path) -> None:
    """As many tokens as before, one of them with a number that has no embedding."""

    def hole(content: dict) -> None:
        vocabulary = content["model"]["vocab"]
        vocabulary[max(vocabulary, key=vocabulary.get)] = 700

    with_json(folder, "tokenizer.json", hole)
    assert "1 tokens without an embedding, such as " in refusal(folder)
    assert f"with number 700: its model has {ROWS} embeddings" in refusal(folder)


def test_rows_longer_than_the_model_reads_are_refused_before_the_run(folder: Path) -> None:
    assert "make 129, this model reads 128" in refusal(folder, lambda where: check_policy_folder(where, "auto", 129))


def test_adapters_are_no_model_alone_or_beside_one(folder: Path) -> None:
    """`from_pretrained` would load the base that they name in place of the weights that stand here."""
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "elsewhere"}))
    assert "adapter_config.json: adapters on another model" in refusal(folder)
    (folder / WEIGHTS).unlink()
    assert "adapter_config.json: adapters on another model" in refusal(folder)


def test_shards_must_be_those_of_their_index(good: Path, tmp_path: Path) -> None:
    load_policy(good).save_pretrained(tmp_path / "whole", max_shard_size="8KB")
    TOKENIZER.save_pretrained(tmp_path / "whole")
    index = "model.safetensors.index.json"
    shards = sorted(path.name for path in (tmp_path / "whole").glob("model-*.safetensors"))
    assert len(shards) > 2
    check(tmp_path / "whole")

    def changed(name: str) -> Path:
        return Path(shutil.copytree(tmp_path / "whole", tmp_path / name))

    gone = changed("gone")
    (gone / shards[1]).unlink()
    with pytest.raises(EnvironmentProblem, match=rf"missing {shards[1]}\. Fix"):
        check(gone)
    swapped = changed("swapped")
    shutil.copy(swapped / shards[0], swapped / shards[1])
    assert f"in {shards[0]} too" in refusal(swapped)
    with_json(changed("astray"), index, lambda c: c["weight_map"].update({DOWN: shards[0], "more": shards[0]}))
    assert f"{DOWN}, more: not in the file that it names" in refusal(tmp_path / "astray")
    with_json(changed("outside"), index, lambda c: c["weight_map"].update({DOWN: "../gone/" + shards[0]}))
    assert "names files outside of the folder" in refusal(tmp_path / "outside")
    both = changed("both")
    shutil.copy(good / WEIGHTS, both / WEIGHTS)
    assert "which of them is the model cannot be told" in refusal(both)
    with_json(changed("nothing"), index, lambda c: c.pop("weight_map"))
    assert "no weight_map" in refusal(tmp_path / "nothing")


@pytest.mark.parametrize("tied", [True, False])
def test_an_output_layer_is_missed_only_where_it_is_not_tied(tmp_path: Path, tied: bool) -> None:
    where = write(tmp_path / "model", llama(tie_word_embeddings=tied))
    has_it = "lm_head.weight" in load_file(where / WEIGHTS)
    assert has_it is not tied
    check(where)
    if tied:  # under either of its names
        with_tensors(where, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
        check(where)
        with_tensors(where, lambda t: t.pop("lm_head.weight"))
    else:
        with_tensors(where, lambda t: t.pop("lm_head.weight"))
    assert "missing: lm_head.weight" in refusal(where)


def test_what_is_no_weight_of_the_model_is_not_missed(folder: Path, tmp_path: Path) -> None:
    """Buffers that older versions saved; names without the prefix of the decoder."""
    with_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    check(folder)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128}
    gpt2 = write(tmp_path / "gpt2", GPT2Config(vocab_size=ROWS, **sizes))
    with_tensors(gpt2, lambda t: [t.update({name.removeprefix("transformer."): t.pop(name)}) for name in list(t)])
    with_tensors(gpt2, lambda t: t.update({"h.0.attn.bias": torch.ones(1, 1, 128, 128, dtype=torch.uint8)}))
    check(gpt2)


KINDS = {
    "llama": llama(num_key_value_heads=1),
    "half": llama(dtype="bfloat16"),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=8),
    "gpt2": GPT2Config(vocab_size=ROWS, n_embd=16, n_layer=2, n_head=2, n_positions=128),
    "mixtral": MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=2),
    "mamba": MambaConfig(vocab_size=ROWS, hidden_size=16, num_hidden_layers=2),
    "bert as decoder": BertConfig(**SIZES, is_decoder=True),
}


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_decoders_of_many_kinds_pass(config: PretrainedConfig, tmp_path: Path) -> None:
    where = write(tmp_path / "model", config)
    check(where)
    model = load_policy(where)
    check_direction(model, "the loaded model")
    assert all(weight.dtype == torch.float32 for weight in model.parameters())
    names = dict(outline(where, AutoModelForCausalLM, read_config(where)).named_parameters())
    assert names.keys() == dict(model.named_parameters()).keys()
    assert all(weight.is_meta for weight in names.values()), "no weight was read for it"


def test_an_encoder_is_refused_before_and_after_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = write(tmp_path / "model", BertConfig(**SIZES))
    assert "BertLMHeadModel: what it says of a text's first tokens changes" in refusal(where)
    loaded = load_policy(where)
    assert "it reads in both directions" in refusal(where, lambda folder: check_direction(loaded, str(folder)))
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 9]])
    assert not torch.allclose(*loaded(ids).logits[:, :2]), "and so it does"
    monkeypatch.setattr(direction, "_smaller", lambda config: None)
    assert "it reads in both directions" in refusal(where), "also where the configuration cannot be made smaller"


def test_an_encoder_with_a_decoder_is_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": ROWS, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    assert "is_encoder_decoder: t5 has an encoder" in refusal(tmp_path)


def test_reward_models_are_checked_member_by_member(good: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(good)
    members = [RewardModel.from_policy(load_policy(good), "gated", seed=seed) for seed in (1, 2)]
    RewardEnsemble(members, "mean").save(tmp_path / "several", tokenizer)
    members[0].save(tmp_path / "one", tokenizer)

    def ask(folder: Path) -> None:
        check_reward_folder(folder, 128)

    for name in ("one", "several"):
        ask(tmp_path / name)
        load_reward_model(tmp_path / name)
    with pytest.raises(
        ConfigError, match=r"LlamaForCausalLM: no sequence classifier, so it has no score\. Fix: a reward model"
    ):
        ask(good)
    with_tensors(tmp_path / "several/member-1", lambda t: t.pop(DOWN.removeprefix("model.")))
    for asked in (ask, load_reward_model):
        assert DOWN.removeprefix("model.") in refusal(tmp_path / "several", asked)
    head = tmp_path / "one/reward_head.safetensors"
    tensors = load_file(head)
    for changed, words in (
        (tensors | {"weight": torch.ones(1, 16)}, "weight (1, 16) instead of (2, 16)"),
        ({name: tensor for name, tensor in tensors.items() if name != "scale"}, "scale missing instead of ()"),
        ({name: tensor for name, tensor in tensors.items() if name != "output_weight"}, "output_weight missing"),
        (tensors | {"shift": torch.tensor(float("nan"))}, "1 tensors with NaN or infinity: shift."),
    ):
        save_file(changed, head)
        for asked in (ask, load_reward_model):
            assert f"reward_head.safetensors: {words}" in refusal(tmp_path / "one", asked)


def test_what_an_ensemble_says_of_its_members_is_checked_before_a_run(good: Path, tmp_path: Path) -> None:
    members = [RewardModel.from_policy(load_policy(good), "last", seed=seed) for seed in (1, 2)]
    RewardEnsemble(members, "mean").save(tmp_path / "whole", load_tokenizer(good))

    def ask(folder: Path) -> None:
        check_reward_folder(folder, 128)

    def refused(words: str) -> None:
        for asked in (ask, load_reward_model):
            assert words in refusal(tmp_path / "several", asked)
        shutil.rmtree(tmp_path / "several")
        shutil.copytree(tmp_path / "whole", tmp_path / "several")

    shutil.copytree(tmp_path / "whole", tmp_path / "several")
    ask(tmp_path / "several")
    path, described = tmp_path / "several/reward_ensemble.safetensors", tmp_path / "several/reward_ensemble.json"
    tensors = load_file(path)
    for changed, words in (
        (tensors | {"weights_M": torch.ones(3)}, "weights_M (3,) instead of (2,)"),
        (tensors | {"weights_M": torch.tensor([0.5, float("nan")])}, "1 tensors with NaN or infinity: weights_M."),
        (tensors | {"reference_MQ": torch.zeros(1, 4)}, "reference_MQ (1, 4) instead of (2, 4)"),
        ({name: tensor for name, tensor in tensors.items() if name != "shift"}, "shift missing instead of ()"),
    ):
        save_file(changed, path)
        refused(f"reward_ensemble.safetensors: {words}")
    path.unlink()
    for asked in (ask, load_reward_model):
        with pytest.raises(EnvironmentProblem, match=r"several: missing reward_ensemble\.safetensors\. Fix: "):
            asked(tmp_path / "several")
    shutil.copy(tmp_path / "whole/reward_ensemble.safetensors", path)
    for settings, words in (
        ({"aggregate": "best"}, "aggregate: 'best' is none"),
        ({"aggregate": "mean", "pessimism": "high"}, "pessimism: 'high' is no number"),
    ):
        described.write_text(json.dumps({"members": 2} | settings))
        refused(f"reward_ensemble.json: {words}")
