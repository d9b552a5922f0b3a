"""A `dvc.lock` that a kill cut off: never by the DVC that the pipeline starts, and mended after anybody else's."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_core.errors import ConfigError
from tasks.frame.changes import changed_stages, stage_changes
from tasks.frame.lock_file import ASIDE, KEPT, dvc_command, keep, mended

DVC_YAML = """\
stages:
  one:
    cmd: echo first one >a.txt
    outs: [a.txt]
  two:
    cmd: cat a.txt a.txt >b.txt
    deps: [a.txt]
    outs: [b.txt]
"""
KILLED_WHILE_DUMPING = """
import os, sys
import dvc.utils.serialize._yaml as yaml
dump = yaml._dump
def cut(data, stream):
    if "stages" in data and "two" in data["stages"]:
        stream.write("schema: '2.0'\\nstages:\\n  one:\\n    cm")
        stream.flush() if hasattr(stream, "fileno") else None
        os._exit(9)
    return dump(data, stream)
yaml._dump = cut
from tasks.frame.lock_file import main
sys.exit(main(["repro", "-q"]))
"""


def dvc(root: Path, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=root, capture_output=True, text=True, check=check)


def git(root: Path, *arguments: str) -> None:
    name = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    subprocess.run(("git", *name, *arguments), cwd=root, check=True, capture_output=True)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages that ran, committed but for what DVC recorded of the second."""
    root = tmp_path_factory.mktemp("lock") / "project"
    root.mkdir()
    git(root, "init", "-q")
    dvc(root, "-m", "dvc", "init", "-q")
    (root / "dvc.yaml").write_text(DVC_YAML)
    dvc(root, "-m", "dvc", "repro", "-q", "one")
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "one")
    dvc(root, "-m", "dvc", "repro", "-q")
    return root


@pytest.fixture
def project(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "project"))


def test_a_kill_while_dvc_records_leaves_the_file_as_it_was(project: Path) -> None:
    git(project, "checkout", "-q", "dvc.lock")
    before = (project / "dvc.lock").read_bytes()
    (project / "dvc.lock").chmod(0o600)
    assert dvc(project, "-c", KILLED_WHILE_DUMPING, check=False).returncode == 9
    assert (project / "dvc.lock").read_bytes() == before
    assert sorted(path.name for path in project.iterdir() if "lock" in path.name) == ["dvc.lock"]
    dvc(project, "-m", "tasks.frame.lock_file", "repro", "-q")
    assert "two:" in (project / "dvc.lock").read_text()
    assert (project / "dvc.lock").stat().st_mode & 0o777 == 0o600
    assert changed_stages(project) == set()


def test_dvc_itself_and_this_one_record_the_same_bytes(project: Path) -> None:
    """The control of the test above too: DVC's own command does leave a cut file there."""
    expected = (project / "dvc.lock").read_bytes()
    dvc(project, "-m", "tasks.frame.lock_file", "repro", "-q", "--force")
    assert (project / "dvc.lock").read_bytes() == expected
    git(project, "checkout", "-q", "dvc.lock")
    in_place = KILLED_WHILE_DUMPING.replace("from tasks.frame.lock_file import main", "from dvc.cli import main")
    assert dvc(project, "-c", in_place, check=False).returncode == 9
    assert dvc(project, "-m", "dvc", "status", check=False).returncode != 0


@pytest.mark.parametrize("cut", ["", "schema: '2.0'\nstages:\n  one:\n    cm", "schema: '2.0'\nstages:\n  one:\n"])
def test_a_cut_file_is_again_what_the_last_stage_kept(
    project: Path, cut: str, capsys: pytest.CaptureFixture[str]
) -> None:
    keep(project)
    whole = (project / "dvc.lock").read_bytes()
    (project / "dvc.lock").write_text(cut)
    assert changed_stages(project) == set()
    assert (project / "dvc.lock").read_bytes() == whole
    assert (project / ASIDE).read_text() == cut
    said = capsys.readouterr().err
    assert said.startswith("warning: ")
    assert "dvc.lock: cut off, probably by a kill; it is again what it was when the last stage began" in said
    assert dvc(project, "-m", "dvc", "status").stdout == "Data and pipelines are up to date.\n"


def test_without_a_copy_the_committed_one_counts_and_without_that_everything_runs_anew(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "dvc.lock").write_text("")
    keep(project)
    assert not (project / KEPT).exists(), "what is cut is no copy"
    assert set(stage_changes(project)) == {"two"}
    assert "the committed one" in capsys.readouterr().err
    git(project, "rm", "-q", "--cached", "dvc.lock")
    git(project, "commit", "-q", "-m", "without")
    (project / "dvc.lock").write_text("")
    assert set(stage_changes(project)) == {"one", "two"}
    assert "there is no copy, so every stage runs anew" in capsys.readouterr().err
    assert not (project / "dvc.lock").exists()


def test_a_merge_conflict_is_nobodys_to_settle(project: Path) -> None:
    text = (project / "dvc.lock").read_text()
    conflict = f"<<<<<<< HEAD\n{text}=======\n{text}>>>>>>> other\n"
    (project / "dvc.lock").write_text(conflict)
    with pytest.raises(ConfigError, match=r"dvc\.lock: holds a merge conflict\. Fix: git checkout --ours dvc\.lock"):
        changed_stages(project)
    assert (project / "dvc.lock").read_text() == conflict


def test_a_whole_file_and_none_are_left_alone(project: Path) -> None:
    assert mended(project) == ""
    (project / "dvc.lock").unlink()
    assert mended(project) == ""
    assert not (project / "dvc.lock").exists()


def test_code_of_before_starts_dvc_itself(tmp_path: Path) -> None:
    assert dvc_command(tmp_path)[-1] == "tasks.frame.lock_file"
    (tmp_path / "tasks").mkdir()
    assert dvc_command(tmp_path)[-1] == "dvc"
    assert os.path.samefile(dvc_command(tmp_path)[0], sys.executable)
