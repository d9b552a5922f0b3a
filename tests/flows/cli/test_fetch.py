"""`rlhf models fetch`, by the real client of the hub against a server that speaks its protocol, and from files."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.gguf_file import write_gguf
from support.hub import COMMIT, Hub, files_of, serving
from support.tokenizer import CHATML, byte_level
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from flows.cli.fetch import fetch
from rlhf_core.errors import ConfigError
from rlhf_core.state.atomic import file_digest, tree_digest
from tasks.fetching.source import check_name, parse_source
from tests.flows.conftest import wait_for

CARD = b"---\nlicense: apache-2.0\n---\n# Tiny\n"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as somebody publishes it, with what nobody needs beside it."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = byte_level(CHATML)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_bytes(CARD)
    return folder


@pytest.fixture
def hub(tiny: Path) -> Iterator[Hub]:
    extra = {"pytorch_model.bin": b"a pickle", "modeling_tiny.py": b"import os", "onnx/model.safetensors": b"another"}
    with serving(Hub(files_of(tiny) | extra)) as served:
        yield served


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    root.mkdir()
    for name in ("dvc.yaml", "params.yaml"):
        (root / name).write_text((Path(__file__).parents[3] / name).read_text())
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    return root


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "flows.cli.app", "models", "fetch", *arguments]


def environment(project: Path, hub: Hub | None, **more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHONPATH"))}
    return kept | {
        "HF_HOME": str(project.parent / "hf"), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1",
        "HF_ENDPOINT": hub.url if hub else "http://127.0.0.1:9", "PYTHONPATH": str(Path(__file__).parents[3]),
        "HF_HUB_ETAG_TIMEOUT": "3", "HF_HUB_DOWNLOAD_TIMEOUT": "3", **more,
    }  # fmt: skip


def rlhf(project: Path, *arguments: str, hub: Hub | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    where = environment(project, hub, **more)
    return subprocess.run(command(*arguments), cwd=project, env=where, capture_output=True, text=True, timeout=120)


def test_a_commit_of_a_repository_without_pickles_code_and_folders(project: Path, hub: Hub, tiny: Path) -> None:
    looked = rlhf(project, "hub:org/tiny@main", "base", "--dry-run", hub=hub)
    assert looked.returncode == 0, looked.stderr
    assert "licence apache-2.0" in looked.stderr
    assert "not read: modeling_tiny.py, onnx/model.safetensors, pytorch_model.bin" in looked.stderr
    assert not (project / "models").exists()

    done = rlhf(project, "hub:org/tiny@main", "base", "--json", hub=hub)
    assert done.returncode == 0, done.stderr
    fetched = project / "models/base"
    note = json.loads((fetched / "provenance.json").read_text())
    assert note == json.loads(done.stdout)
    assert (note["source"], note["commit"], note["licence"]) == ("hub:org/tiny@main", COMMIT, "apache-2.0")
    assert note["files"] == tree_digest(tiny)
    assert {path.name for path in fetched.iterdir()} == {*tree_digest(tiny), "provenance.json"}
    assert [path.name for path in (project / "models").iterdir()] == ["base"], "nothing is left beside it"
    for path in fetched.iterdir():
        assert not path.is_symlink(), "the cache may go"

    asked = len(hub.asked)
    again = rlhf(project, "hub:org/tiny@main", "base", hub=hub)
    assert (again.returncode, again.stdout) == (0, "models/base\n")
    assert "there already" in again.stderr
    assert not any("resolve" in path for _, path, _ in hub.asked[asked:])


def test_a_killed_download_goes_on_where_it_ended(project: Path, hub: Hub, tiny: Path) -> None:
    config = LlamaConfig.from_pretrained(tiny, vocab_size=50_000)  # 26 MB: the client keeps 10 MB at a time
    large = project.parent / "large"
    LlamaForCausalLM(config).save_pretrained(large)
    hub.files |= files_of(large)
    hub.stall_after = 15_000_000
    process = subprocess.Popen(
        command("hub:org/tiny@main", "base"), cwd=project, env=environment(project, hub, HF_HUB_DOWNLOAD_TIMEOUT="60"),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert hub.stalled.wait(60)
    wait_for(lambda: any(path.stat().st_size for path in project.parent.rglob("*.part")), 30, "10 MB on disk")
    process.kill()
    process.wait()
    assert not (project / "models/base").exists()
    hub.stall_after = None
    done = rlhf(project, "hub:org/tiny@main", "base", hub=hub)
    assert done.returncode == 0, done.stderr
    assert "bytes=10485760-" in [found for _, path, found in hub.asked if path.endswith("/model.safetensors")]
    assert (project / "models/base/model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert {path.name for path in (project / "models").iterdir()} == {"base"}, "what the killed one began is gone"


def test_bytes_that_the_hub_did_not_name_are_thrown_away(project: Path, hub: Hub, tiny: Path) -> None:
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny, vocab_size=50_000)).save_pretrained(project.parent / "large")
    hub.files |= files_of(project.parent / "large")
    hub.spoilt = True
    refused = rlhf(project, "hub:org/tiny@main", "base", hub=hub)
    assert refused.returncode == 7, refused.stderr
    assert "model.safetensors: not the bytes that the hub names" in refused.stderr
    assert not list(project.parent.rglob("*.part"))
    hub.spoilt = False
    assert rlhf(project, "hub:org/tiny@main", "base", hub=hub).returncode == 0


def test_a_download_that_breaks_off_is_one_line(project: Path, hub: Hub) -> None:
    hub.cut_after = 1000
    failed = rlhf(project, "hub:org/tiny@main", "base", hub=hub)
    assert failed.returncode == 7, failed.stderr
    assert "Traceback" not in failed.stderr
    assert failed.stderr.strip().splitlines()[-1].startswith("hub:org/tiny@main: ")
    assert not (project / "models/base").exists()


def test_without_a_network_the_cache_serves(project: Path, hub: Hub, tiny: Path) -> None:
    assert rlhf(project, "hub:org/tiny@main", "one", hub=hub).returncode == 0
    done = rlhf(project, "hub:org/tiny@main", "two", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert "licence apache-2.0; not read: modeling_tiny.py" in done.stderr
    assert tree_digest(project / "models/two") == tree_digest(project / "models/one")
    lacking = rlhf(project, "hub:org/other@main", "three", HF_HUB_OFFLINE="1")
    assert lacking.returncode == 7
    assert "the cache does not hold it" in lacking.stderr


def test_a_private_repository_wants_the_token_of_the_environment(project: Path, hub: Hub) -> None:
    hub.token = "hf_secret"
    refused = rlhf(project, "hub:org/tiny@main", "base", hub=hub)
    assert refused.returncode == 2
    assert "HF_TOKEN" in refused.stderr
    done = rlhf(project, "hub:org/tiny@main", "base", hub=hub, HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    everything = "".join(path.read_text("utf-8", "replace") for path in (project / "models/base").iterdir())
    assert "hf_secret" not in everything + done.stdout + done.stderr


@pytest.mark.parametrize(
    ("change", "code", "line"),
    [
        ({"config.json": b'{"model_type": "llama", "auto_map": {"AutoModel": "modeling_tiny.Tiny"}}'}, 2, "auto_map"),
        ({"config.json": b'{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}'}, 2, "gptq"),
        ({"model.safetensors": None}, 2, "no model.safetensors (it has pytorch_model.bin, which is not read)"),
        ({"config.json": None}, 2, "no config.json"),
        ({"tokenizer.json": None, "tokenizer_config.json": None}, 7, "missing tokenizer.json"),
    ],
)
def test_what_cannot_be_used_is_refused_before_its_weights(
    project: Path, hub: Hub, change: dict[str, bytes | None], code: int, line: str
) -> None:
    for name, content in change.items():
        if content is None:
            del hub.files[name]
        else:
            hub.files[name] = content
    refused = rlhf(project, "hub:org/tiny@main", "base", hub=hub)
    assert refused.returncode == code, refused.stderr
    assert line in refused.stderr.strip().splitlines()[-1]
    assert "Traceback" not in refused.stderr
    assert not (project / "models/base").exists()
    if "config.json" in change:
        assert not any(path.endswith("/model.safetensors") for _, path, _ in hub.asked)


@pytest.mark.parametrize(
    ("source", "line"),
    [("hub:org/tiny@nothing", "no revision nothing"), ("hub:org/absent@main", "no such repository")],
)
def test_what_the_hub_does_not_have(project: Path, hub: Hub, source: str, line: str) -> None:
    refused = rlhf(project, source, "base", hub=hub)
    assert refused.returncode == 2, refused.stderr
    assert line in refused.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("hub:tiny", "not of the form hub:ORG/NAME@REVISION"),
        ("hub:org/tiny@../..?", "not of the form hub:ORG/NAME@REVISION"),
        ("nowhere.gguf", "there is no such file"),
        ("a word", "none of hub:ORG/NAME@REVISION"),
        (__file__, "none of hub:ORG/NAME@REVISION"),
    ],
)
def test_sources_that_are_none(source: str, line: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(line)):
        parse_source(source)
    assert parse_source("hub:org/tiny").revision == "main"


@pytest.mark.parametrize("name", ["none", "../up", ".hidden", "a/b", ""])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ConfigError, match="no name of a folder"):
        check_name(name)


def test_a_folder_and_what_stands_at_the_name(project: Path, tiny: Path) -> None:
    done = rlhf(project, str(tiny), "mine")
    assert done.returncode == 0, done.stderr
    note = json.loads((project / "models/mine/provenance.json").read_text())
    assert (note["source"], note["licence"], note["files"]) == ("model", "unknown", tree_digest(tiny))
    assert rlhf(project, str(tiny), "mine").returncode == 0
    copied = rlhf(project, str(project / "models/mine"), "copy")
    assert copied.returncode == 0, copied.stderr
    assert json.loads((project / "models/copy/provenance.json").read_text())["before"]["source"] == "model"

    (project / "models/mine/README.md").write_text("mine now")
    changed = rlhf(project, str(tiny), "mine")
    assert changed.returncode == 2
    assert "README.md is not as fetched" in changed.stderr
    other = rlhf(project, str(project / "models/copy"), "mine")
    assert other.returncode == 2
    assert "is there already, and it is model at" in other.stderr


def test_the_model_is_the_one_that_was_published(project: Path, hub: Hub, tiny: Path) -> None:
    assert rlhf(project, f"hub:org/tiny@{COMMIT}", "base", hub=hub).returncode == 0
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        first, second = (AutoModelForCausalLM.from_pretrained(at)(ids).logits for at in (tiny, project / "models/base"))
    assert torch.equal(first, second)


def test_a_gguf_file_becomes_full_weights(project: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    path = project.parent / "tiny.gguf"
    write_gguf(model, tokenizer, path)
    monkeypatch.chdir(project)
    assert fetch(str(path), "base") == 0
    note = json.loads((project / "models/base/provenance.json").read_text())
    assert (note["source"], note["licence"], note["commit"]) == ("tiny.gguf", "apache-2.0", file_digest(path))
    made, read = (find.from_pretrained(project / "models/base") for find in (AutoModelForCausalLM, AutoTokenizer))
    text = "A question about aisle F and the price of 12 brooms?"
    assert read(text)["input_ids"] == tokenizer(text)["input_ids"]
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(made(ids).logits, model(ids).logits)
    assert made.dtype == torch.float32

    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ConfigError, match="no model can be made of it"):
        fetch(str(path), "cut")
    assert not (project / "models/cut").exists()
