"""The other forms: adapters by peft, one GGUF file, an ONNX graph; each the version, or refused with a line."""

import importlib.util
import json
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from support.exporting import PROMPTS, make_policy, make_subject
from support.gguf_file import write_gguf
from support.tokenizer import byte_level
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from rlhf_core.config.lora import LoraConfig
from rlhf_core.errors import ConfigError, EnvironmentProblem, GateRefused
from rlhf_core.models.adapters import adapted_layers, add_adapters
from rlhf_core.models.policy import load_policy, save_policy
from rlhf_core.text.tokenizer import load_tokenizer
from tasks.exporting.export import Wish, export
from tasks.exporting.gguf_file import refuse_architecture


def silent(line):
    """Progress that nobody reads."""


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A version that was trained with LoRA on `rlhf-sft/1`."""
    home = tmp_path_factory.mktemp("adapted")
    subject = make_subject(home)
    make_policy(home / "sft", seed=8)
    model = load_policy(home / "sft")
    add_adapters(model, LoraConfig(rank=4, alpha=8), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            up = layer.lora_B["default"].weight
            up.copy_(torch.randn(up.shape, generator=generator) * 0.2)
    save_policy(model, load_tokenizer(home / "sft"), subject.folder)
    return replace(subject, base=("rlhf-sft/1", home / "sft"))


def test_adapters_on_their_base_are_the_version(adapted, tmp_path):
    said = export(adapted, tmp_path / "out", Wish(format="adapter"), silent)
    assert said["parity"]["equal"] == 12
    assert said["parity"]["program"].startswith("peft")
    assert said["adapter_base"] == "the registered version rlhf-sft/1"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= names
    assert "model.safetensors" not in names
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None, "a name that is in no hub would be looked up there"
    assert "library_name: peft" in (tmp_path / "out/README.md").read_text()

    ids = AutoTokenizer.from_pretrained(tmp_path / "out")(PROMPTS[0], return_tensors="pt")["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(adapted.base[1])
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(base, tmp_path / "out")(ids).logits
        torch.testing.assert_close(theirs, load_policy(adapted.folder)(ids).logits, rtol=0, atol=1e-4)


def test_adapters_on_another_base_are_noticed_and_a_base_of_a_hub_is_named(adapted, tmp_path):
    make_policy(tmp_path / "other", seed=9)
    with pytest.raises(GateRefused, match="as adapter it is another model"):
        export(
            replace(adapted, base=("rlhf-sft/2", tmp_path / "other")), tmp_path / "out", Wish(format="adapter"), silent
        )
    note = {"key": "model.path", "source": "hub:org/base@main", "commit": "f" * 40, "licence": "mit", "before": None}
    manifest = {**adapted.manifest, "model_folders": {"sft": note}}
    export(replace(adapted, base=None, manifest=manifest), tmp_path / "out", Wish(format="adapter"), silent)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "f" * 40)
    gone = {**adapted.manifest, "model_folders": {"models/gone": note}}
    with pytest.raises(EnvironmentProblem, match="which its adapters were trained on, is gone"):
        export(replace(adapted, base=None, manifest=gone), tmp_path / "gone", Wish(format="adapter"), silent)


def test_a_version_without_adapters(tmp_path):
    with pytest.raises(ConfigError, match="was trained without adapters"):
        export(make_subject(tmp_path), tmp_path / "out", Wish(format="adapter"), silent)


def tensors_of(path):
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def test_a_gguf_file_holds_what_converters_write(tmp_path):
    subject = make_subject(tmp_path, chat=True)
    said = export(subject, tmp_path / "out", Wish(format="gguf"), silent)
    assert (said["file"], said["parity"]["equal"], said["parity"]["encoded"]) == ("rlhf-policy-3-f32.gguf", 12, 12)
    ours = tmp_path / "out" / said["file"]
    write_gguf(load_policy(subject.folder), load_tokenizer(subject.folder), tmp_path / "theirs.gguf")
    theirs = tensors_of(tmp_path / "theirs.gguf")
    theirs.pop("output.weight")  # tied: readers take the embedding
    assert tensors_of(ours).keys() == theirs.keys()
    for name, tensor in tensors_of(ours).items():
        np.testing.assert_array_equal(tensor, theirs[name])
    field = gguf.GGUFReader(ours).get_field("tokenizer.chat_template")
    assert field.contents() == load_tokenizer(subject.folder).chat_template


def test_float16_is_said_and_held_against_the_rounded_version(tmp_path):
    subject = make_subject(tmp_path)
    said = export(subject, tmp_path / "out", Wish(format="gguf", numbers="float16"), silent)
    assert said["parity"]["largest"] <= 1e-5
    assert 0 <= said["greedy_equal_unrounded"] <= 12
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out/rlhf-policy-3-f16.gguf").tensors}
    kept = load_policy(subject.folder).get_input_embeddings().weight.detach().half().numpy()
    np.testing.assert_array_equal(np.array(stored["token_embd.weight"].data), kept)
    assert stored["output_norm.weight"].data.dtype == np.float32
    assert f"on {said['greedy_equal_unrounded']} of 12 prompts" in (tmp_path / "out/README.md").read_text()


def qwen3(folder):
    tokenizer = byte_level(None)
    config = Qwen3Config(
        vocab_size=len(tokenizer) + 3, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=128, max_position_embeddings=256, initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    save_policy(Qwen3ForCausalLM(config).eval(), tokenizer, folder)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_other_families_in_a_gguf_file(tmp_path, family):
    subject = make_subject(tmp_path, family="qwen2")
    if family == "qwen3":
        qwen3(subject.folder)
    said = export(subject, tmp_path / "out", Wish(format="gguf"), silent)
    assert said["parity"]["equal"] + said["parity"]["ties"] == 12


def test_what_a_gguf_file_cannot_hold_is_refused(tmp_path):
    plain = {"model_type": "llama", "hidden_act": "silu", "rope_parameters": {"rope_type": "default"}}
    refuse_architecture("rlhf-policy/3", plain)
    for change, why in (
        ({"model_type": "qwen3", "head_dim": 64}, "heads of 64"),
        ({"model_type": "gpt2"}, "model_type gpt2"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "positions scaled by yarn"),
        ({"attention_bias": True}, "a bias in attention"),
        ({"hidden_act": "gelu"}, "the activation gelu"),
    ):
        with pytest.raises(ConfigError, match=f"rlhf-policy/3: gguf: {why}"):
            refuse_architecture("rlhf-policy/3", plain | change)
    subject = make_subject(tmp_path)
    parts = json.loads((subject.folder / "tokenizer.json").read_text())
    parts["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True}, parts["pre_tokenizer"],
    ]}  # fmt: skip
    (subject.folder / "tokenizer.json").write_text(json.dumps(parts))
    with pytest.raises(ConfigError, match=r"its tokenizer \(BPE, split by Digits then ByteLevel\) is none"):
        export(subject, tmp_path / "out", Wish(format="gguf"), silent)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="extra onnx is not installed")
@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_an_onnx_graph_is_the_version(tmp_path, chat):
    import onnxruntime

    subject = make_subject(tmp_path, chat=chat)
    said = export(subject, tmp_path / "out", Wish(format="onnx"), silent)
    assert (said["parity"]["equal"], said["parity"]["encoded"]) == (12, 12)
    assert said["parity"]["program"].startswith("onnxruntime")
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx", providers=["CPUExecutionProvider"])
    ids = torch.tensor([[1, 5, 9, 3], [0, 0, 7, 4]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    (logits,) = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    with torch.no_grad():
        alone = load_policy(subject.folder)(ids[1:, 2:]).logits
    torch.testing.assert_close(torch.from_numpy(logits)[1:, 2:], alone, rtol=0, atol=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is not None, reason="extra onnx is installed")
def test_a_missing_package_is_one_line(tmp_path):
    with pytest.raises(EnvironmentProblem, match=r"onnx: missing .*onnxruntime.*pip install 'rlhf-pipeline\[onnx\]'"):
        export(make_subject(tmp_path), tmp_path / "out", Wish(format="onnx"), silent)
    assert not (tmp_path / "out").exists()
