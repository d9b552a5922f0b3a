"""`rlhf models push`: into a repository of a hub by its real client, or a folder, and back by `rlhf models fetch`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.exporting import make_subject
from support.hub import Hub, serving

from flows.cli.app import run_command
from rlhf_core.state.atomic import tree_digest
from tasks.exporting.bundle import verify_folder
from tasks.exporting.export import Wish, export
from tasks.lineage.provenance import read_provenance

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    export(make_subject(home), home / "out/policy", Wish(licence="apache-2.0"), lambda line: None)
    return home / "out/policy"


@pytest.fixture
def hub():
    with serving(Hub({})) as served:
        served.exists = False
        yield served


@pytest.fixture
def project(tmp_path):
    root = tmp_path / "project"
    root.mkdir()
    for name in ("dvc.yaml", "params.yaml"):
        (root / name).write_text((ROOT / name).read_text())
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    return root


def rlhf(project, hub, *arguments, **more):
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHONPATH", "RLHF_"))}
    where = kept | {
        "HF_HOME": str(project.parent / "hf"), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1",
        "HF_ENDPOINT": hub.url, "PYTHONPATH": str(ROOT), "HF_TOKEN": "hf_writer", **more,
    }  # fmt: skip
    command = [sys.executable, "-m", "flows.cli.app", "models", *arguments]
    return subprocess.run(command, cwd=project, env=where, capture_output=True, text=True, timeout=120, check=False)


def test_pushed_fetched_back_and_verified_it_is_the_same(project, hub, folder):
    hub.writer = "hf_writer"
    pushed = rlhf(project, hub, "push", str(folder), "hub:org/tiny", "--json")
    assert pushed.returncode == 0, pushed.stderr
    assert (hub.visibility, hub.messages) == ("private", ["rlhf-policy/3 by rlhf models push"])
    assert json.loads(pushed.stdout)["commit"] == hub.commit
    assert {name: content for name, content in hub.files.items() if name != ".gitattributes"} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }
    assert list(hub.large) == ["model.safetensors"], "the weights went by LFS"

    hub.licence = "apache-2.0"
    fetched = rlhf(project, hub, "fetch", "hub:org/tiny@main", "back")
    assert fetched.returncode == 0, fetched.stderr
    back = project / "models/back"
    assert {**tree_digest(back), "provenance.json": ""} == {**tree_digest(folder), "provenance.json": ""}
    note = read_provenance(back)
    assert (note.source, note.commit, note.licence) == ("hub:org/tiny@main", hub.commit, "apache-2.0")
    assert (note.before["source"], note.before["commit"]) == ("rlhf-policy/3", "c" * 64)
    found = verify_folder(back)
    assert (found.problems, found.beside) == ((), ("provenance.json",))


def test_the_same_again_something_else_and_a_branch(project, hub, folder):
    assert rlhf(project, hub, "push", str(folder), "hub:org/tiny@next").returncode == 0
    assert hub.branches == ["next"]
    again = rlhf(project, hub, "push", str(folder), "hub:org/tiny@next")
    assert again.returncode == 0, again.stderr
    assert "there already" in again.stderr
    assert len(hub.messages) == 1, "no second commit"
    hub.files["README.md"] = b"somebody else's"
    hub.files["more.txt"] = b"more"
    refused = rlhf(project, hub, "push", str(folder), "hub:org/tiny@next")
    assert refused.returncode == 2
    assert "is there already and holds other files" in refused.stderr.splitlines()[-1]
    assert hub.files["more.txt"] == b"more"
    updated = rlhf(project, hub, "push", str(folder), "hub:org/tiny@next", "--update")
    assert updated.returncode == 0, updated.stderr
    assert hub.files["README.md"] == (folder / "README.md").read_bytes()
    assert "more.txt" not in hub.files


def test_no_rights_no_hub_and_no_repository(project, hub, folder):
    hub.writer = "hf_other"
    refused = rlhf(project, hub, "push", str(folder), "hub:org/tiny")
    assert (refused.returncode, hub.exists) == (2, False)
    assert "may not write there" in refused.stderr.splitlines()[-1]
    assert "hf_writer" not in refused.stdout + refused.stderr
    away = rlhf(project, hub, "push", str(folder), "hub:org/tiny", HF_ENDPOINT="http://127.0.0.1:9")
    assert away.returncode == 7, away.stderr
    assert "Traceback" not in away.stderr
    wrong = rlhf(project, hub, "push", str(folder), "hub:tiny")
    assert wrong.returncode == 2


def test_a_folder_that_was_changed_goes_nowhere(project, hub, folder, tmp_path):
    assert run_command(["models", "push", str(folder), str(tmp_path / "copy")]) == 0
    (tmp_path / "copy/config.json").write_text("{}")
    refused = rlhf(project, hub, "push", str(tmp_path / "copy"), "hub:org/tiny")
    assert refused.returncode == 3
    assert "config.json: changed" in refused.stderr.splitlines()[-1]
    assert not hub.exists


def test_into_a_folder(folder, tmp_path, capsys):
    target = tmp_path / "disk/model"
    assert run_command(["models", "push", str(folder), str(target)]) == 0
    assert tree_digest(target) == tree_digest(folder)
    assert run_command(["models", "push", str(folder), str(target)]) == 0
    assert "there already" in capsys.readouterr().err
    (target / "mine").write_text("mine")
    assert run_command(["models", "push", str(folder), str(target)]) == 2
    assert [path.name for path in target.parent.iterdir()] == ["model"]
