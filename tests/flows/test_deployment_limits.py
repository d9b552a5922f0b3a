"""Deployments at their limits, with a real server and worker: time, tries, runs at a time, a busy server, the form."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.servers import known_servers
from flows.settings import prefect_settings
from tests.flows.conftest import plain_environment
from tests.flows.test_deployments import rlhf

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
PLAY = """
import json, sys
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import State, StateType
from tests.flows.conftest import processes_in, wait_for
client = get_client(sync_client=True).__enter__()
endless, flaky, faulty = (UUID(key) for key in sys.argv[1:])
runs = Path.cwd() / "runs"
def begin(key):
    return client.create_flow_run_from_deployment(key).id
def until(run, condition, what, seconds=120):
    wait_for(lambda: condition(client.read_flow_run(run).state), seconds, what)
def told(run):
    found = client.read_flow_run(run)
    tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run])))
    lines = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run])))
    return {
        "name": found.name, "state": found.state.name, "type": found.state.type.value, "message": found.state.message,
        "begun": found.start_time.timestamp() if found.start_time else None,
        "ended": found.end_time.timestamp() if found.end_time else None,
        "tries": {task.name: task.run_count for task in tasks},
        "errors": [line.message for line in lines if line.level >= 40],
    }
late = begin(endless)
until(late, lambda state: state.is_running(), "the first run is at work")
second = begin(endless)
until(second, lambda state: state.is_final(), "a second run of its deployment is left out")
seen = {"skipped": told(second)}
shaky, third = begin(flaky), begin(faulty)
until(shaky, lambda state: state.is_running(), "the second deployment's run is at work")
until(late, lambda state: state.is_final(), "the run is ended by its time limit", 150)
seen["late"] = told(late)
folder = runs / seen["late"]["name"]
wait_for(lambda: not processes_in(folder), 5, "its processes end")
seen["late_summary"] = json.loads((folder / "reports/summary.json").read_text())
client.set_flow_run_state(late, State(type=StateType.SCHEDULED, name="AwaitingRetry", message="Retry from the UI"))
until(third, lambda state: state.is_final(), "the third comes once there is room")
until(shaky, lambda state: state.is_final(), "the faults have passed")
until(late, lambda state: state.is_completed(), "what was ended goes on")
seen |= {"shaky": told(shaky), "faulty": told(third), "again": told(late)}
seen["again_summary"] = json.loads((folder / "reports/summary.json").read_text())
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def seen(served_project: Path) -> dict[str, Any]:
    """Three deployments, two runs at a time: one is ended by its limit of a minute, one by its data, one gets there."""
    keys = [
        json.loads(rlhf(served_project, "deploy", "--name", name, "--at-once", "2", "--json", *options))["id"]
        for name, *options in (
            ("endless", "--run-timeout", "1", "--set", "sft.max_steps=700"),
            ("flaky", "--retries", "2", "--set", "seed=17"),
            ("faulty", "--retries", "2", "--set", "seed=13"),
        )
    ]
    settings = prefect_settings(served_project, known_servers(served_project)["prefect"].port)
    done = subprocess.run(
        [sys.executable, "-c", PLAY, *keys],
        cwd=served_project,
        env=plain_environment(**settings, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_run_that_takes_too_long_is_ended_and_goes_on_when_it_is_retried(seen: dict[str, Any]) -> None:
    late, first = seen["late"], seen["late_summary"]
    assert (late["type"], late["state"]) == ("FAILED", "TimedOut")
    assert "Retry or `rlhf resume` goes on from here" in late["message"]
    assert late["ended"] - late["begun"] >= 60
    assert (first["status"], first["message"]) == ("interrupted", "ended (timeout)")
    statuses = {stage["name"]: stage["status"] for stage in first["stages"]}
    assert statuses == {"first": "done", "second@ppo": "interrupted", "second@dpo": "interrupted"}
    again = {stage["name"]: stage["status"] for stage in seen["again_summary"]["stages"]}
    assert again == {"first": "unchanged", "second@ppo": "done", "second@dpo": "done"}
    assert seen["again"]["name"] == late["name"]


def test_a_fault_that_can_pass_is_waited_for_and_one_that_cannot_is_not(seen: dict[str, Any]) -> None:
    shaky, faulty = seen["shaky"], seen["faulty"]
    assert shaky["type"] == "COMPLETED"
    assert shaky["tries"] == {"first": 3, "second@ppo": 1, "second@dpo": 1}
    assert shaky["ended"] - shaky["begun"] > 10 + 30
    assert faulty["type"] == "FAILED"
    assert faulty["tries"] == {"first": 1}
    assert "data/x.jsonl:1: prompt: empty. Fix: drop the row" in faulty["message"]
    assert shaky["errors"] == []
    (line,) = faulty["errors"]
    assert faulty["message"] in line
    assert "\n" not in line


def test_no_more_runs_are_at_work_than_may_be_over_all_deployments(seen: dict[str, Any]) -> None:
    assert seen["skipped"]["type"] == "CANCELLED"
    assert "concurrency limit" in seen["skipped"]["message"]
    assert seen["shaky"]["begun"] < seen["late"]["ended"], "two at a time"
    assert seen["faulty"]["begun"] > min(seen["late"]["ended"], seen["shaky"]["ended"]), "and not three"
