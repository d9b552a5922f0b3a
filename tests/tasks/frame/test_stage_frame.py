"""The frame around a stage: published at once or not at all, exit codes, one at a time, dies with its parents."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.timing import patience

from rlhf_core.errors import ConfigError
from tasks.frame.definition import input_digests, stage_definition
from tasks.frame.stage import curves_csv
from tasks.frame.watchdog import process_start

DVC_YAML = """
stages:
  toy:
    cmd: unused
    deps: [input.txt]
    params: [seed]
    outs: [artifacts/toy]
    metrics: [reports/metrics/toy.json]
"""

DRIVER = """
import sys, time
from pathlib import Path
from rlhf_core import errors
from rlhf_core.config import Params
from tasks.frame import process
from tasks.frame.watchdog import end_with_ancestors
import os

process.LOCK_WAIT_SECONDS = 1.0

def body(stage):
    (stage.out / "first.txt").write_text("a")
    what = os.environ.get("TOY", "")
    if what == "sleep":
        print("asleep", flush=True)
        time.sleep(60)
    if what == "refuse":
        raise errors.DataError("data.jsonl:3: response: empty. Fix: drop the row")
    if what == "bug":
        raise KeyError("x")
    if what == "full":
        raise OSError(28, "No space left on device", "some/file")
    (stage.out / "second.txt").write_text("b")
    stage.history = [{"step": 1, "loss/train": 0.5}]
    stage.log(1, 1, {"loss/train": 0.5}, tokens=7)
    return {"figure": 0.1}

end_with_ancestors(os.environ)
sys.exit(process.run_stage("toy", body, Params(), Path.cwd()))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "dvc.yaml").write_text(DVC_YAML)
    (tmp_path / "input.txt").write_text("input")
    (tmp_path / "driver.py").write_text(DRIVER)
    return tmp_path


def command() -> list[str]:
    return [sys.executable, "driver.py"]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), **more}


def run(project: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(), cwd=project, env=environment(**more), capture_output=True, text=True, timeout=60, check=False
    )


def events(project: Path) -> list[dict]:
    return [json.loads(line) for line in (project / ".rlhf/progress/toy.jsonl").read_text().splitlines()]


def published(project: Path) -> list[str]:
    found = [*project.glob("artifacts/**/*"), *project.glob("reports/**/*")]
    return sorted(path.relative_to(project).as_posix() for path in found if path.is_file())


def test_a_folder_without_the_graph_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("seed: 1\n")
    command = [sys.executable, "-m", "tasks", "validate"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("dvc.yaml: no such file. Fix: run from the project's root\n")


def test_a_stage_publishes_outputs_metrics_and_curves(project: Path) -> None:
    done = run(project)
    assert done.returncode == 0, done.stderr
    assert published(project) == [
        "artifacts/toy/first.txt",
        "artifacts/toy/second.txt",
        "reports/metrics/toy.json",
        "reports/plots/toy.csv",
    ]
    assert json.loads((project / "reports/metrics/toy.json").read_text()) == {"figure": 0.1}
    assert [event["event"] for event in events(project)] == ["start", "progress", "done"]
    assert events(project)[-1]["tokens"] == 7
    assert not list((project / ".rlhf/staging").iterdir())


@pytest.mark.parametrize(
    ("how", "code", "says"),
    [
        ("refuse", 4, "data.jsonl:3: response: empty. Fix: drop the row"),
        ("bug", 1, "KeyError"),
        ("full", 7, "disk full"),
    ],
)
def test_a_failure_has_its_exit_code_and_publishes_nothing(project: Path, how: str, code: int, says: str) -> None:
    done = run(project, TOY=how)
    assert done.returncode == code
    assert says in done.stderr
    assert published(project) == []
    assert events(project)[-1]["event"] == "failed"
    assert events(project)[-1]["exit_code"] == code


@pytest.mark.parametrize("point", ["stage.before_publish", "stage.during_publish", "stage.after_publish"])
def test_killed_around_publishing_then_run_again(project: Path, point: str) -> None:
    killed = run(project, RLHF_FAULT=f"{point}:kill")
    assert killed.returncode == -signal.SIGKILL
    if point == "stage.before_publish":
        assert published(project) == []
    again = run(project)
    assert again.returncode == 0, again.stderr
    assert len(published(project)) == 4
    assert not list((project / ".rlhf/staging").iterdir()), "the dead process's folder must be swept"


def sleeping(project: Path, **more: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        command(), cwd=project, env=environment(TOY="sleep", **more), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "asleep"
    return process


def test_sigterm_ends_it_cleanly_with_143(project: Path) -> None:
    process = sleeping(project)
    process.terminate()
    assert process.wait(timeout=patience(10)) == 143
    assert published(project) == []
    assert not list((project / ".rlhf/staging").iterdir())


def test_a_second_one_is_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = sleeping(project)
    try:
        started = time.monotonic()
        second = run(project)
        assert second.returncode == 7
        assert "already running" in second.stderr
        assert time.monotonic() - started < patience(30)
    finally:
        process.kill()
        process.wait()


def test_it_dies_with_its_supervisor(project: Path) -> None:
    supervisor = subprocess.Popen(["sleep", "60"])
    start = process_start(supervisor.pid)
    process = sleeping(project, RLHF_SUPERVISOR=f"{supervisor.pid}:{start}")
    supervisor.kill()
    supervisor.wait()
    assert process.wait(timeout=patience(5)) == -signal.SIGKILL


def test_it_dies_with_the_process_that_started_its_shell(project: Path) -> None:
    starter = "import subprocess, sys; subprocess.run(f'{sys.executable} driver.py; true', shell=True)"
    parent = subprocess.Popen(
        [sys.executable, "-c", starter], cwd=project, env=environment(TOY="sleep"), stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    parent.stdout.readline()
    pid = events(project)[0]["pid"]
    assert process_start(pid) is not None
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + patience(5)
    while process_start(pid) is not None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert process_start(pid) is None


def test_curves_leave_gaps_empty() -> None:
    text = curves_csv([{"step": 1, "b": 0.25}, {"step": 2, "a": 1.0, "b": 0.1 + 0.2}])
    assert text == "step,a,b\n1,,0.25\n2,1.0,0.30000000000000004\n"


def test_input_digests_see_every_file_and_no_bytecode(project: Path) -> None:
    definition = stage_definition(project, "toy")
    before = input_digests(project, definition)
    assert list(before) == ["input.txt"]
    (project / "input.txt").write_text("other")
    assert input_digests(project, definition) != before


@pytest.mark.parametrize(
    ("dep", "cure"), [("artifacts/sft", "dvc repro toy"), ("models/none", "git checkout models/none, dvc pull")]
)
def test_an_input_that_is_gone_is_named_with_its_cure(project: Path, dep: str, cure: str) -> None:
    (project / "dvc.yaml").write_text(DVC_YAML.replace("input.txt", dep))
    with pytest.raises(ConfigError, match=f"^{dep}: stage toy needs it and it is not there. Fix: {cure}"):
        input_digests(project, stage_definition(project, "toy"))


def test_a_python_without_the_libraries_hands_over_to_the_environment(tmp_path: Path) -> None:
    """`.venv/bin/dvc repro` without activation starts whatever `python3` is on PATH."""
    root = Path(__file__).parents[3]
    worktree = tmp_path / "home/runs/one"
    worktree.mkdir(parents=True)
    (worktree / "tasks").symlink_to(root / "tasks")
    chosen = tmp_path / "home/.venv/bin/python"
    chosen.parent.mkdir(parents=True)
    chosen.write_text('#!/bin/sh\necho "handed over: $@"\n')
    chosen.chmod(0o755)
    bare = [sys.executable, "-I", "-S", "-c", "import runpy, sys; sys.path.insert(0, '.'); runpy.run_module('tasks', run_name='__main__', alter_sys=True)", "sft"]  # fmt: skip  # noqa: E501
    done = subprocess.run(bare, cwd=worktree, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "handed over: -m tasks sft\n", done.stderr
    chosen.unlink()
    alone = subprocess.run(bare, cwd=worktree, capture_output=True, text=True, timeout=60, check=False)
    assert alone.returncode == 7
    assert "torch is not installed here" in alone.stderr
