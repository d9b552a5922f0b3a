"""Folders with models: what is built, what is saved, what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from rlhf_core.config import ModelConfig
from rlhf_core.errors import ConfigError, EnvironmentProblem
from rlhf_core.model_folder import check_model_folder
from rlhf_core.models.policy import build_policy, check_vocabulary, eos_token_ids, load_policy, save_policy
from rlhf_core.state.atomic import tree_digest
from rlhf_core.text.tokenizer import load_tokenizer, train_tokenizer

TOKENIZER = train_tokenizer(["some words to learn from"], 270)


def tiny(family: str = "llama", seed: int = 3) -> PreTrainedModel:
    cfg = ModelConfig(family=family, hidden_size=16, heads=2, layers=1, intermediate_size=16)
    return build_policy(cfg, len(TOKENIZER), 0, 1, seed)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_policy(tiny(), TOKENIZER, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_seed_alone_decides_the_weights(family: str) -> None:
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    first = tiny(family).state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(12)
    second, third = tiny(family).state_dict(), tiny(family, seed=4).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["model.embed_tokens.weight"], third["model.embed_tokens.weight"])


def test_embeddings_are_tied_and_nothing_drops_out() -> None:
    model = tiny()
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert not model.training
    assert model.config.attention_dropout == 0.0


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_saving_loading_and_saving_again_gives_the_same_bytes(tmp_path: Path, family: str) -> None:
    model = tiny(family)
    save_policy(model, TOKENIZER, tmp_path / "one")
    loaded = load_policy(tmp_path / "one")
    save_policy(loaded, load_tokenizer(tmp_path / "one"), tmp_path / "two")
    assert tree_digest(tmp_path / "one") == tree_digest(tmp_path / "two")
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    for path in (tmp_path / "two").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), f"{path.name} says where the model came from"


def test_weights_have_one_metadata_key_because_more_come_in_any_order(folder: Path) -> None:
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_plain_transformers_loads_it(folder: Path) -> None:
    ids = torch.tensor([[5, 6, 7]])
    plain = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    assert torch.equal(plain(ids).logits, load_policy(folder)(ids).logits)


def test_n29_a_pretrained_model_loses_its_dropout(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=len(TOKENIZER), n_embd=8, n_layer=1, n_head=1, n_positions=16, resid_pdrop=0.5)
    model = GPT2LMHeadModel(config)
    save_policy(model, TOKENIZER, tmp_path / "gpt2")
    loaded = load_policy(tmp_path / "gpt2").train()
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(loaded(ids).logits, loaded(ids).logits)


def test_all_that_is_missing_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(EnvironmentProblem, match=r"missing config.json; model.safetensors; tokenizer.json"):
        check_model_folder(tmp_path)
    with pytest.raises(EnvironmentProblem, match="there is no such folder"):
        load_policy(tmp_path / "nowhere")


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(EnvironmentProblem, match=r"pytorch_model.bin is not read: a pickle can run code"):
        load_policy(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(EnvironmentProblem, match=r"missing model-00001-of-00002.safetensors\. Fix"):
        load_policy(folder)


@pytest.mark.parametrize("load", [load_policy, load_tokenizer])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_folder_that_brings_code_is_refused(folder: Path, name: str, load: Callable) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**content, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    (folder / "evil.py").write_text("raise SystemExit('code of the folder ran')")
    with pytest.raises(ConfigError, match=rf"{name}: auto_map: the folder wants to run code"):
        load(folder)


def test_a_broken_config_is_named(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json: not JSON"):
        load_policy(folder)


def test_a_tokenizer_without_pad_pads_with_its_end_and_one_without_end_is_refused(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in content.items() if key != "pad_token"}))
    loaded = load_tokenizer(folder)
    assert loaded.pad_token_id == loaded.eos_token_id == 1
    path.write_text(json.dumps({key: value for key, value in content.items() if key != "eos_token"}))
    with pytest.raises(ConfigError, match="eos_token: there is none"):
        load_tokenizer(folder)


def test_a_tokenizer_larger_than_the_embedding_is_refused() -> None:
    check_vocabulary(tiny(), TOKENIZER)
    with pytest.raises(ConfigError, match=r"has 10 tokens without an embedding, .* number 279: its model has 270 emb"):
        check_vocabulary(tiny(), train_tokenizer(["other words of many more kinds than before"] * 3, 280))


def test_every_declared_end_token_ends() -> None:
    model = tiny()
    assert eos_token_ids(model, TOKENIZER) == (1,)
    model.generation_config.eos_token_id = [7, 5]
    assert eos_token_ids(model, TOKENIZER) == (1, 5, 7)
