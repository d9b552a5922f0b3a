"""`rlhf run` on a real server: finished, unchanged, cancelled, interrupted, refused, in a worktree."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.timing import costs_at_most, patience

from tests.flows.conftest import on_server, plain_environment, processes_in, set_steps, wait_for

pytestmark = pytest.mark.integration

CANCEL = """
import sys
from uuid import UUID
from prefect.client.orchestration import get_client
from prefect.states import Cancelling
with get_client(sync_client=True) as client:
    client.set_flow_run_state(UUID(sys.argv[1]), Cancelling(), force=True)
"""
STATE = """
import json, sys
from uuid import UUID
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, LogFilter, LogFilterFlowRunId
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
with get_client(sync_client=True) as client:
    key = UUID(sys.argv[1])
    this = FlowRunFilter(id=FlowRunFilterId(any_=[key]))
    run = client.read_flow_run(key)
    tasks = client.read_task_runs(flow_run_filter=this)
    logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[key])))
    artifacts = client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[key])))
    print(json.dumps({
        "name": run.name, "state": run.state.type.value, "message": run.state.message,
        "tasks": {task.name: [task.state.type.value, task.state.name] for task in tasks},
        "logs": [log.message for log in logs], "artifacts": sorted(one.key for one in artifacts),
    }))
"""
RUN_WITHOUT_ASKING = """
import sys
from prefect.client.orchestration import SyncPrefectClient
def refuse(client, task_run_id):
    raise AssertionError(f"asked how {task_run_id} ended")
SyncPrefectClient.read_task_run = refuse
from flows.cli.app import run_command
sys.exit(run_command(["run"]))
"""


def rlhf(project: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli.app", *arguments],
        cwd=project,
        env=plain_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout_s: float = 120) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=timeout_s)
    return process.returncode, out, err


def state_of(project: Path, run: dict) -> dict:
    return json.loads(on_server(project, STATE, flow_run_id(run)))


def flow_run_id(run: dict) -> str:
    return run["flow_run_url"].rpartition("/")[2]


def live(project: Path) -> dict:
    return json.loads((project / ".rlhf/run.json").read_text())


@contextmanager
def long_run(project: Path) -> Iterator[subprocess.Popen[str]]:
    """A run whose first stage counts for a long time, from the moment it counts."""
    set_steps(project, 2000)
    process = rlhf(project, "run")
    stream = project / ".rlhf/progress/first.jsonl"
    stream.unlink(missing_ok=True)
    wait_for(lambda: stream.exists() and '"progress"' in stream.read_text(), 60, "the stage counts")
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
        set_steps(project, 3)


def test_a_run_and_its_repetition(served_project: Path) -> None:
    set_steps(served_project, 4)
    code, out, err = finish(rlhf(served_project, "run", "--json"))
    assert code == 0, err
    run = json.loads(out)
    assert run == live(served_project) == json.loads((served_project / "reports/summary.json").read_text())
    assert [(stage["name"], stage["status"]) for stage in run["stages"]] == [
        ("first", "done"), ("second@ppo", "done"), ("second@dpo", "done"),
    ]  # fmt: skip
    assert all(stage["overhead_s"] < patience(8) for stage in run["stages"])
    assert "first: done" in err
    assert "\x1b" not in err, "no terminal, so no colours and no redrawing"

    seen = state_of(served_project, run)
    assert (seen["name"], seen["state"]) == (run["run"], "COMPLETED")
    assert set(seen["tasks"]) == {"first", "second@ppo", "second@dpo"}
    assert {state for state, _ in seen["tasks"].values()} == {"COMPLETED"}
    assert "counting" in seen["logs"]
    assert {"first-stage", "first-metrics", "second-ppo-stage", "run-summary"} <= set(seen["artifacts"])

    clean = subprocess.run([sys.executable, "-m", "dvc", "status"], cwd=served_project, capture_output=True, text=True)
    assert "up to date" in clean.stdout
    started = time.monotonic()
    code, out, err = finish(rlhf(served_project, "run"))
    assert code == 0, err
    assert time.monotonic() - started < patience(30)
    again = live(served_project)
    assert {stage["status"] for stage in again["stages"]} == {"unchanged"}
    assert "nothing had changed" in out
    assert all(command in out for command in ("rlhf ui", "rlhf report", "rlhf models compare"))
    names = {name for _, name in state_of(served_project, again)["tasks"].values()}
    assert names == {"Unchanged"}


def test_how_a_stage_ended_is_not_asked_of_the_server(served_project: Path) -> None:
    """It answers from events that may be on their way still: of a stage that failed, that it runs."""
    on_server(served_project, RUN_WITHOUT_ASKING)  # asserts that it ends well
    assert {stage["status"] for stage in live(served_project)["stages"]} <= {"done", "unchanged"}


def test_cancelling_through_the_api_ends_the_stage(served_project: Path) -> None:
    with long_run(served_project) as process:
        run = live(served_project)
        on_server(served_project, CANCEL, flow_run_id(run))
        wait_for(lambda: not processes_in(served_project), 5, "the stage's processes end")
        code, _, err = finish(process, patience(20))
        assert code == 143
        assert "rlhf resume" in err
        assert state_of(served_project, run)["state"] == "CANCELLED"
        assert live(served_project)["status"] == "interrupted"
        assert not (served_project / "artifacts/first/result.txt").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_in_time_and_resume_goes_on(served_project: Path, number: signal.Signals, code: int) -> None:
    with long_run(served_project) as process:
        key = live(served_project)["run_key"]
        os.kill(process.pid, number)
        wait_for(lambda: not processes_in(served_project), 5, "the stage's processes end")
        found, _, err = finish(process, patience(20))
        assert found == code
        assert "rlhf resume" in err
        assert processes_in(served_project) == []
    status = json.loads(finish(rlhf(served_project, "status", "--json"))[1])["runs"][0]
    assert (status["status"], status["resume"]) == ("interrupted", "rlhf resume")
    found, out, err = finish(rlhf(served_project, "resume", "--json"))
    assert found == 0, err
    assert json.loads(out)["run_key"] == key


def test_a_second_run_is_refused_by_name(served_project: Path) -> None:
    with long_run(served_project) as process:
        name = live(served_project)["run"]
        code, _, err = finish(rlhf(served_project, "run"), patience(30))
        assert code == 7
        assert name in err
        assert f"process {process.pid}" in err
        with costs_at_most(3):
            code, out, _ = finish(rlhf(served_project, "status", "--json"))
        status = json.loads(out)["runs"][0]
        assert (status["status"], status["pid"]) == ("running", process.pid)
        first = status["stages"][0]
        assert first["status"] == "running"
        assert 0 < first["step"] < first["total"] == 2000


def test_a_killed_run_leaves_no_process_and_no_lock(served_project: Path) -> None:
    with long_run(served_project) as process:
        process.kill()
        wait_for(lambda: not processes_in(served_project), 5, "the stage ends with its run")
    code, _, err = finish(rlhf(served_project, "run"))
    assert code == 0, err


def test_a_failing_stage_gives_its_code_and_line(served_project: Path) -> None:
    before = (served_project / "params.yaml").read_text()
    (served_project / "params.yaml").write_text(before.replace("seed: 0", "seed: 13"))
    try:
        code, out, err = finish(rlhf(served_project, "run"))
    finally:
        (served_project / "params.yaml").write_text(before)
    assert (code, out) == (4, "")
    assert "data/x.jsonl:1: prompt: empty. Fix: drop the row" in err
    assert "Traceback" not in err
    seen = state_of(served_project, live(served_project))
    assert seen["state"] == "FAILED"
    assert seen["tasks"]["first"][0] == "FAILED"
    assert set(seen["tasks"]) == {"first"}


def test_a_run_with_a_name_has_a_worktree_of_its_own(served_project: Path) -> None:
    before = (served_project / "params.yaml").read_bytes()
    code, out, err = finish(rlhf(served_project, "run", "--name", "other", "--set", "sft.max_steps=5", "--json"))
    assert code == 0, err
    run = json.loads(out)
    assert run["run"] == "other"
    worktree = served_project / "runs/other"
    assert (worktree / "artifacts/first/result.txt").read_text() == "first counted to 5"
    assert (worktree / "reports/summary.json").exists()
    assert (served_project / "params.yaml").read_bytes() == before
    assert not (worktree / ".rlhf/servers.json").exists(), "servers are the main checkout's"
    assert re.search(r"max_steps: 5", (worktree / "params.yaml").read_text())
    runs = json.loads(finish(rlhf(served_project, "status", "--json"))[1])["runs"]
    assert {run["root"]: run["status"] for run in runs}["runs/other"] == "done"
    code, _, err = finish(rlhf(served_project, "run", "--name", "other"))
    assert code == 2
    assert "rlhf resume other" in err
