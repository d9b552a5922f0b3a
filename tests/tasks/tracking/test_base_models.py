"""Where a version's pretrained model came from, in its manifest, tags and description; versions fetched as folders."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.tracking import MODEL, STAGE, git, record_policy

from flows.cli.fetch import fetch
from rlhf_core.state.atomic import tree_digest
from tasks.lineage.model_folders import folder_notes
from tasks.lineage.provenance import changed_since, read_provenance, write_provenance
from tasks.tracking import read_manifest, resolve_version

OWN = "seed: 1\ncompute:\n  threads: 2\nmodel: {source: folder, path: models/own}\n"


@pytest.fixture
def own(checkout: Path) -> Path:
    """A fetched folder that the checkout's parameters name."""
    folder = checkout / "models/own"
    folder.mkdir(parents=True)
    (folder / "weights").write_text("pretrained")
    write_provenance(folder, "hub:org/tiny@main", "3f2c1a" + "0" * 34, "apache-2.0")
    (checkout / ".gitignore").write_text((checkout / ".gitignore").read_text() + "/models/\n")
    (checkout / "params.yaml").write_text(OWN)
    git(checkout, "commit", "--quiet", "--all", "--message", "own")
    return folder


def test_a_version_says_which_pretrained_model_it_comes_from(checkout: Path, own: Path) -> None:
    record_policy(checkout, "run", "first", scores=[0.1] * 6)
    version, manifest = read_manifest(checkout, "rlhf-policy/1")
    assert manifest["model_folders"] == {
        "models/own": {
            "key": "model.path", "source": "hub:org/tiny@main", "commit": "3f2c1a" + "0" * 34, "licence": "apache-2.0",
            "before": None, "changed": [],
        }
    }  # fmt: skip
    assert version.tags["base_model"] == "models/own: hub:org/tiny@main 3f2c1a000000, licence apache-2.0"
    from tasks.tracking.store import open_store

    said = open_store(checkout).client.get_model_version("rlhf-policy", "1").description
    assert "from the pretrained model `models/own: hub:org/tiny@main 3f2c1a000000, licence apache-2.0`" in said


def test_what_was_changed_since_or_never_noted_is_said(checkout: Path, own: Path) -> None:
    (own / "weights").write_text("pretrained and a little more")
    (own / "more").write_text("new")
    (own / "provenance.json").rename(checkout / "note")
    assert folder_notes(checkout, OWN) == {"models/own": {"key": "model.path", "source": "unknown"}}
    (checkout / "note").rename(own / "provenance.json")
    assert folder_notes(checkout, OWN)["models/own"]["changed"] == ["more", "weights"]
    record_policy(checkout, "run", "first", scores=[0.1] * 6)
    assert resolve_version(checkout, "rlhf-policy/1").tags["base_model"].endswith("licence apache-2.0, changed since")
    assert folder_notes(checkout, "seed: 1\n") == {}


def test_models_from_numbers_have_no_such_tag(checkout: Path) -> None:
    record_policy(checkout, "run", "first", scores=[0.1] * 6)
    assert "base_model" not in resolve_version(checkout, "rlhf-policy/1").tags


def test_a_registered_version_is_fetched_as_a_folder(
    registered: tuple[Any, ...], checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(checkout)
    made = tree_digest(checkout / MODEL)
    shutil.rmtree(checkout / MODEL)
    assert fetch("rlhf-policy/1", "mine", json=True) == 0
    note = json.loads(capsys.readouterr().out)
    version = resolve_version(checkout, "rlhf-policy/1")
    assert (note["source"], note["commit"]) == ("rlhf-policy/1", version.outputs_hash)
    assert note["files"] == made
    found = read_provenance(checkout / "models/mine")
    assert found is not None
    assert changed_since(checkout / "models/mine", found) == []
    assert not list((checkout / ".rlhf/staging").glob("*fetch*")), "what was looked at is gone"
    assert version.stage == STAGE
