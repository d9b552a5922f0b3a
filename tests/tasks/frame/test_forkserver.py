"""Stages forked from a process that has imported: the same bytes, the code that lies there, and nobody left behind."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.project import processes_of
from support.timing import patience
from support.warm_processes import stage_environment

from rlhf_core.state.atomic import tree_digest
from tasks import paths
from tasks.frame.forked import LOG, ForkedProcess, Forks
from tasks.frame.runner import StageResult, Stop, run_stage_process

pytestmark = pytest.mark.integration


@pytest.fixture
def project(finished_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The finished project as a DVC repository; nobody's settings reach its processes."""
    folder = Path(shutil.copytree(finished_project, tmp_path / "project", symlinks=True))
    for command in (("init", "-q", "--no-scm"), ("config", "core.analytics", "false")):
        subprocess.run([sys.executable, "-m", "dvc", *command], cwd=folder, check=True, capture_output=True)
    for name in set(os.environ) - set(stage_environment()):
        monkeypatch.delenv(name)
    return folder


def forks_of(project: Path, *stages: str, **more: str) -> Forks:
    # modules come from where the server starts, as they do for `python3 -m tasks`
    return Forks(project, stages, stage_environment(SHELL="/bin/sh", **more) | {"PYTHONPATH": ""})


def run(project: Path, stage: str, forks: Forks, on_event: Callable = lambda event: None, stop: Stop | None = None):
    lines: list[str] = []
    result = run_stage_process(
        project, stage, stop=stop or Stop(), forks=forks, options=("-f",), on_event=on_event, on_line=lines.append
    )
    return result, lines


def said(project: Path) -> str:
    return (project / LOG).read_text()


def wait_until_none_of(project: Path, within_s: float) -> None:
    deadline = time.monotonic() + patience(within_s)
    while found := processes_of(project):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def test_forked_stages_make_the_bytes_of_fresh_ones(project: Path, finished_project: Path) -> None:
    stages = ("label", "sft", "align@ppo")
    for stage in stages:
        shutil.rmtree(project / paths.stage_output(stage))
    with forks_of(project, *stages) as forks:
        for stage in stages:
            result, lines = run(project, stage, forks)
            assert (result.exit_code, result.ran, result.message) == (0, True, ""), lines
            found, expected = (tree_digest(root / paths.stage_output(stage)) for root in (project, finished_project))
            assert found == expected
    assert said(project) == "", "none was refused"
    assert (project / "dvc.lock").read_text().count("cmd: python3 -m tasks") == len(stages), "DVC recorded each"
    wait_until_none_of(project, 2.0)


def test_what_dvc_finds_unchanged_is_not_run(project: Path) -> None:
    with forks_of(project, "label") as forks:
        first, _ = run(project, "label", forks)
        again = run_stage_process(project, "label", stop=Stop(), forks=forks)
    assert (first.ran, again.ran, again.exit_code) == (True, False, 0)


def test_the_code_of_the_folder_runs_and_an_edit_is_seen(project: Path) -> None:
    module = project / "tasks/stages/label/run.py"
    module.write_text(module.read_text() + '\nprint("one")\n')
    with forks_of(project, "label") as forks:
        assert "one" in said_by(run(project, "label", forks), project)
        module.write_text(module.read_text().replace('"one"', '"another"'))
        result, lines = run(project, "label", forks)
    assert result.exit_code == 0
    assert "another" in lines
    assert "code was changed" in said(project)


def said_by(outcome: tuple[StageResult, list[str]], project: Path) -> str:
    """What a stage printed, with what its module printed when the server imported it."""
    assert outcome[0].exit_code == 0
    return "\n".join(outcome[1]) + said(project)


def test_a_folder_of_older_code_starts_its_stages_afresh(project: Path) -> None:
    (project / "tasks/frame/forkserver.py").unlink()
    with forks_of(project, "label") as forks:
        result, _ = run(project, "label", forks)
    assert (result.exit_code, result.ran) == (0, True)
    assert "No module named" in said(project)


def test_an_import_that_starts_a_thread_is_no_process_to_fork(project: Path) -> None:
    module = project / "tasks/stages/label/run.py"
    module.write_text(
        module.read_text()
        + "\nimport threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    with forks_of(project, "label") as forks:
        result, _ = run(project, "label", forks)
    assert (result.exit_code, result.ran) == (0, True)
    assert "an import started a thread" in said(project)


def test_an_error_of_the_stage_comes_through(project: Path) -> None:
    (project / "params.yaml").write_text("sft: {max_steps: many}\n")
    with forks_of(project, "label") as forks:
        result, lines = run(project, "label", forks)
    assert result.exit_code == 2
    assert any("max_steps" in line for line in lines)


@pytest.mark.parametrize("whom", ["the stage", "dvc", "the server"])
def test_whoever_is_killed_nobody_is_left_and_the_next_stage_runs(project: Path, whom: str) -> None:
    shutil.rmtree(project / paths.stage_output("sft"))
    with forks_of(project, "sft", "label", RLHF_FAULT="train.step@3:sleep") as forks:

        def kill(event) -> None:
            if event["event"] == "progress" and event["step"] == 2:
                stage = stage_pid.pop()
                dvc = parent_of(stage)
                os.kill({"the stage": stage, "dvc": dvc, "the server": parent_of(dvc)}[whom], signal.SIGKILL)
            elif event["event"] == "start":
                stage_pid.append(event["pid"])

        stage_pid: list[int] = []
        result, _ = run(project, "sft", forks, kill)
        assert result.exit_code != 0
        assert "killed from outside" in result.message
        assert not (project / paths.stage_output("sft")).exists()
        if whom == "the server":
            wait_until_none_of(project, 1.0)
        result, _ = run(project, "label", forks)
        assert (result.exit_code, result.ran) == (0, True)
    wait_until_none_of(project, 1.0)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_stage_that_is_told_to_end_ends_in_order(project: Path) -> None:
    stop = Stop()
    with forks_of(project, "sft") as forks:
        result, _ = run(
            project, "sft", forks, lambda event: event["event"] == "progress" and stop.request("SIGTERM"), stop
        )
    assert result.exit_code == 143
    assert '"failed"' in (project / paths.progress_file("sft")).read_text(), "the stage itself noted why"
    assert not list((project / paths.STAGING).iterdir())


def test_two_stages_at_once_keep_to_themselves(project: Path, finished_project: Path) -> None:
    results: dict[str, StageResult] = {}
    with forks_of(project, "align@ppo", "align@dpo") as forks:
        threads = [
            threading.Thread(target=lambda stage=stage: results.update({stage: run(project, stage, forks)[0]}))
            for stage in ("align@ppo", "align@dpo")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {stage: (one.exit_code, one.ran) for stage, one in results.items()} == {
        "align@ppo": (0, True),
        "align@dpo": (0, True),
    }
    for stage in results:
        found, expected = (tree_digest(root / paths.stage_output(stage)) for root in (project, finished_project))
        assert found == expected
    lock = (project / "dvc.lock").read_text()
    assert "align@ppo" in lock
    assert "align@dpo" in lock


def test_a_server_that_is_gone_is_no_obstacle(project: Path) -> None:
    forks = forks_of(project, "label")
    forks.close()
    assert forks.start("label", ["repro", "label"]) is None


def test_waiting_for_the_imports_can_be_given_up(project: Path) -> None:
    module = project / "tasks/stages/label/run.py"
    module.write_text("import time\ntime.sleep(600)\n")
    with forks_of(project, "label") as forks:
        started = time.monotonic()
        asked: ForkedProcess | None = forks.start("label", ["repro", "label"], given_up=lambda: True)
        assert asked is None
        assert time.monotonic() - started < patience(2)
    wait_until_none_of(project, 1.0)
