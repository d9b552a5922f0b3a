"""Asking DVC in a process of its own: the same answer, the same refusals, and nobody left behind."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from dvc.repo import Repo
from support.timing import patience

from rlhf_core.errors import ConfigError, EnvironmentProblem
from tasks.frame.asked import ChangedStages
from tasks.frame.changes import changed_stages

DVC_YAML = """\
stages:
  one:
    cmd: echo first one >a.txt
    outs: [a.txt]
  two:
    cmd: cat a.txt a.txt >b.txt
    deps: [a.txt]
    outs: [b.txt]
  three:
    cmd: echo three >c.txt
    outs: [c.txt]
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "dvc.yaml").write_text(DVC_YAML)
    for command in (("init", "-q", "--no-scm"), ("repro", "-q")):
        subprocess.run([sys.executable, "-m", "dvc", *command], cwd=tmp_path, check=True, capture_output=True)
    return tmp_path


def ask(project: Path) -> set[str]:
    with ChangedStages(project) as asked:
        return asked.result()


def test_the_answer_is_that_of_this_process(project: Path) -> None:
    assert ask(project) == changed_stages(project) == set()
    (project / "b.txt").unlink()
    assert ask(project) == changed_stages(project) == {"two"}
    (project / "dvc.yaml").write_text(DVC_YAML.replace("first one", "first once"))
    assert ask(project) == changed_stages(project) == {"one", "two"}


def test_a_refusal_is_of_the_same_kind_in_the_same_words(project: Path) -> None:
    (project / "dvc.yaml").write_text("stages:\n  one:\n    nonsense: 1\n")
    with pytest.raises(ConfigError) as here:
        changed_stages(project)
    with pytest.raises(ConfigError) as there:
        ask(project)
    assert str(there.value) == str(here.value)


def test_a_dvc_at_work_is_a_fault_of_the_surroundings(project: Path) -> None:
    with Repo(str(project)) as repo, repo.lock, pytest.raises(EnvironmentProblem, match="another dvc command is at"):
        ask(project)


def test_what_dvc_says_meanwhile_is_no_part_of_the_answer(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chatty = tmp_path / "site/sitecustomize.py"
    chatty.parent.mkdir()
    chatty.write_text("import dvc.repo.status as s\nold = s._joint_status\n"
                      "s._joint_status = lambda *a, **k: print('a hint') or old(*a, **k)\n")  # fmt: skip
    monkeypatch.setenv("PYTHONPATH", str(chatty.parent))
    (project / "b.txt").unlink()
    assert ask(project) == {"two"}


def test_a_question_that_is_taken_back_leaves_no_process(project: Path) -> None:
    with ChangedStages(project):
        children = psutil.Process().children(recursive=True)
        assert any("tasks.frame.asked" in child.cmdline() for child in children)
    until = time.monotonic() + patience(5)
    while any(child.is_running() for child in children) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any("tasks.frame.asked" in child.cmdline() for child in children if child.is_running())
