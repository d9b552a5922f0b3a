"""`rlhf models export`: the folder is the version, for a stranger too, and whole or not there."""

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support.exporting import HELDOUT, PROMPTS, make_subject

from flows.cli.export import verify
from rlhf_core.errors import ConfigError, DataError, EnvironmentProblem, GateRefused
from rlhf_core.models.policy import load_policy
from rlhf_core.rollout.sampler import Sampling, sample_responses
from rlhf_core.text.tokenizer import encode_prompts, load_tokenizer
from tasks.exporting.bundle import verify_folder
from tasks.exporting.export import Wish, export
from tasks.exporting.formats import FORMATS
from tasks.exporting.hf import write_hf
from tasks.exporting.policies import policy_as
from tasks.exporting.prompts import texts_to_try
from tasks.exporting.signing import make_key, signing_key

STRANGER = """
import json, sys
for name in ("rlhf_core", "tasks", "flows"):
    sys.modules[name] = None  # an import of it is an error
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
written = []
for prompt in json.loads(sys.argv[2]):
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        ids = list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"])
    else:
        ids = tokenizer(prompt)["input_ids"]
    first = len(ids)
    for _ in range(8):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    written.append(ids[first:])
print(json.dumps(written))
"""


def silent(line):
    """Progress that nobody reads."""


def greedy(folder):
    model, tokenizer = load_policy(folder), load_tokenizer(folder)
    return sample_responses(
        model, encode_prompts(tokenizer, PROMPTS, 120), Sampling.of(model, tokenizer, 8), temperature=0.0,
        generator=torch.Generator(), batch_size=4,
    ).response_ids  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def subject(home):
    return make_subject(home)


@pytest.fixture(scope="module")
def exported(subject, home):
    make_key(home / "key")
    folder = home / "out/policy"
    said = export(subject, folder, Wish(key=signing_key(home / "key")), silent)
    return folder, said


def test_every_byte_is_listed_and_signed_and_the_weights_are_those_of_the_version(exported, subject):
    folder, said = exported
    found = verify_folder(folder)
    assert (found.problems, found.signature.holds) == ((), True)
    assert said["content"] == subject.content
    for path in subject.folder.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert {path.name for path in folder.iterdir()} - {path.name for path in subject.folder.iterdir()} == {
        "README.md", "rlhf_manifest.json", "rlhf_manifest.sig",
    }  # fmt: skip
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "nothing is left beside it"


def test_the_check_counted_what_it_compared(exported):
    parity = exported[1]["parity"]
    assert (parity["rows"], parity["equal"], parity["encoded"], parity["encodable"]) == (12, 12, 12, 12)
    assert parity["compared"] > 12
    assert 0 < parity["largest"] <= 1e-5, "two programs, so the last digits differ, and no more than they"
    assert parity["program"].startswith("transformers")


@pytest.mark.parametrize("model", [{}, {"chat": True}, {"family": "qwen2"}], ids=["plain", "chat", "qwen2"])
def test_a_process_that_cannot_import_the_project_writes_the_same(tmp_path, model):
    made = make_subject(tmp_path, **model)
    export(made, tmp_path / "out", Wish(), silent)
    done = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, str(tmp_path / "out"), json.dumps(PROMPTS)],
        cwd=tmp_path, env={"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == greedy(made.folder)


def test_the_card_says_what_it_is_where_from_and_how_far_to_trust_it(exported, subject):
    _, head, text = (exported[0] / "README.md").read_text().split("---\n", 2)
    said = yaml.safe_load(head)
    assert (said["license"], said["library_name"], said["pipeline_tag"]) == (
        "unknown", "transformers", "text-generation",
    )  # fmt: skip
    assert "model-index" not in said, "figures by a simulated judge are no results"
    digest = hashlib.sha256(subject.manifest["dvc_lock"].encode()).hexdigest()
    for part in (
        "# rlhf-policy/3", "**Simulated:**", "| demonstrations | 30 | 28 | 2 |", "| win_rate | 0.7 | 0.6 to 0.8 |",
        "| kl_to_sft | undefined |", "**failed**: max_kl_to_sft", "a" * 40, digest, "at most 120", "Nobody said under",
        "AutoModelForCausalLM", "greedy tokens equal on 12 of 12 prompts",
    ):  # fmt: skip
        assert part in text, part


def test_a_card_of_a_model_from_a_hub_whose_labels_people_gave(tmp_path):
    made = make_subject(tmp_path, params="label: {source: file}\nevaluate: {judges: [reward_model]}\n")
    fetched = {"source": "hub:org/base@main", "commit": "f" * 40, "licence": "apache-2.0", "changed": []}
    copied = {"key": "model.path", "source": "base", "commit": "e" * 64, "licence": "apache-2.0", "before": fetched}
    rows = {"source": "hub:org/pairs@main", "commit": "9" * 40, "licence": "mit"}
    manifest = {**made.manifest, "model_folders": {"models/base": copied}, "data_files": {"data/pairs.jsonl": rows}}
    export(replace(made, manifest=manifest), tmp_path / "out", Wish(), silent)
    _, head, text = (tmp_path / "out/README.md").read_text().split("---\n", 2)
    said = yaml.safe_load(head)
    assert (said["license"], said["base_model"], said["datasets"]) == ("apache-2.0", "org/base", ["org/pairs"])
    (index,) = said["model-index"]
    assert index["results"][0]["metrics"] == [{"type": "win_rate", "value": 0.7}]
    assert "Simulated" not in text
    export(replace(made, manifest=manifest), tmp_path / "named", Wish(licence="mit"), silent)
    text = (tmp_path / "named/README.md").read_text()
    assert "license: mit" in text
    assert "The pretrained model is under `apache-2.0`" in text


def test_the_same_export_again_is_left_as_it_is_and_anything_else_is_refused(exported, subject, home):
    folder, said = exported
    before = (folder / "rlhf_manifest.json").stat().st_mtime_ns
    assert export(subject, folder, Wish(), silent) == said
    assert (folder / "rlhf_manifest.json").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="is there already, and it is rlhf-policy/3"):
        export(replace(subject, content="9" * 64), folder, Wish(), silent)
    (home / "other").mkdir()
    (home / "other/mine.txt").write_text("mine")
    for there in (home / "other", home / "other/mine.txt"):
        with pytest.raises((ConfigError, EnvironmentProblem)):
            export(subject, there, Wish(), silent)
    assert (home / "other/mine.txt").read_text() == "mine"


def spoiling(monkeypatch, spoil):
    """Let the writer of `hf` spoil what it wrote."""

    def write(source, folder):
        written = write_hf(source, folder)
        spoil(folder)
        return written

    spoilt = replace(FORMATS["policy", "hf"], make=policy_as("hf", write))
    monkeypatch.setattr("tasks.exporting.export.FORMATS", {("policy", "hf"): spoilt})


def test_what_is_another_model_for_a_stranger_is_not_written(subject, tmp_path, monkeypatch):
    def spoil(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"] *= 1.001
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    spoiling(monkeypatch, spoil)
    with pytest.raises(GateRefused, match="as hf it is another model: log-probabilities of"):
        export(subject, tmp_path / "out", Wish(), silent)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_others_read_otherwise_is_noticed(subject, tmp_path, monkeypatch):
    def spoil(folder):
        parts = json.loads((folder / "tokenizer.json").read_text())
        parts["pre_tokenizer"]["add_prefix_space"] = True
        (folder / "tokenizer.json").write_text(json.dumps(parts))

    spoiling(monkeypatch, spoil)
    with pytest.raises(GateRefused, match="prompts encoded alike 0 of 12"):
        export(subject, tmp_path / "out", Wish(), silent)


def test_prompts_come_by_lineage_or_from_a_file(subject, tmp_path):
    assert [prompt for prompt, _ in texts_to_try(subject, None)] == PROMPTS
    elsewhere = replace(subject, home=tmp_path)
    with pytest.raises(EnvironmentProblem, match="is in no checkout and not in DVC's cache"):
        texts_to_try(elsewhere, None)
    run = tmp_path / "runs/one" / HELDOUT
    run.parent.mkdir(parents=True)
    pq.write_table(pq.read_table(subject.home / HELDOUT).slice(0, 3), run)
    with pytest.raises(EnvironmentProblem):
        texts_to_try(elsewhere, None)  # others than the version's
    run.write_bytes((subject.home / HELDOUT).read_bytes())
    assert len(texts_to_try(elsewhere, None)) == 12
    given = tmp_path / "mine.jsonl"
    given.write_text("".join(json.dumps({"prompt": f"say {number % 250}"}) + "\n" for number in range(500)))
    assert len(texts_to_try(elsewhere, given)) == 200
    given.write_text('{"text": "no prompt"}\n')
    with pytest.raises(DataError, match="nothing to try the export on"):
        texts_to_try(elsewhere, given)


def test_a_mixture_has_no_such_form(subject, tmp_path):
    mixed = tmp_path / "model"
    mixed.mkdir()
    (mixed / "mixture.json").write_text("{}")
    with pytest.raises(ConfigError, match="mixes the next-token probabilities"):
        export(replace(subject, folder=mixed), tmp_path / "out", Wish(), silent)
    with pytest.raises(ConfigError, match="hf is written in float32"):
        export(subject, tmp_path / "out", Wish(numbers="float16"), silent)


def test_verify_finds_a_changed_weight(exported, tmp_path, capsys):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in exported[0].iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert verify(copy) == 0
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    assert verify(copy) == 3
    assert "model.safetensors: changed" in capsys.readouterr().out
    assert Path(copy / "README.md").is_file()
