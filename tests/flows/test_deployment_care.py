"""Deployments over time: Retry in the UI, runs that were missed or lost, what is listed and deleted."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.flows.conftest import on_server
from tests.flows.test_deployments import rlhf

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
START = """
import json, sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import State, StateType
from prefect.states import Cancelling, Running, Scheduled
from tests.flows.conftest import wait_for
client = get_client(sync_client=True).__enter__()
key = UUID(sys.argv[1])
def until(run, condition, what):
    wait_for(lambda: condition(client.read_flow_run(run.id).state), 120, what)
    return client.read_flow_run(run.id)
"""
RETRY = (
    START
    + """
wish = {"run": {"profile": "small", "overrides": ["sft.max_steps=150"]}}
run = client.create_flow_run_from_deployment(key, parameters=wish)
runs = Path.cwd() / "runs"
second = lambda: any('"progress"' in path.read_text() for path in runs.glob("*/.rlhf/progress/second-*.jsonl"))
wait_for(second, 120, "the second stage counts")
client.set_flow_run_state(run.id, Cancelling(), force=True)
ended = until(run, lambda state: state.is_final(), "the run ends")
(folder,) = runs.iterdir()
result = folder / "artifacts/first/result.txt"
before = result.stat().st_mtime_ns
client.set_flow_run_state(run.id, State(type=StateType.SCHEDULED, name="AwaitingRetry", message="Retry from the UI"))
until(run, lambda state: state.is_running(), "it is tried again")
again = until(run, lambda state: state.is_final(), "it ends again")
summary = json.loads((folder / "reports/summary.json").read_text())
print(json.dumps({
    "first": ended.state.type.value, "second": again.state.type.value, "name": again.name, "tags": again.tags,
    "folders": [path.name for path in runs.iterdir()], "kept": result.stat().st_mtime_ns == before,
    "stages": {stage["name"]: stage["status"] for stage in summary["stages"]}, "message": again.state.message,
}))
"""
)
LEFT = (
    START
    + """
from types import SimpleNamespace
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import ConcurrencyLimitStrategy
import flows.flow_runs, flows.leftovers
class Later(datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.at
flows.leftovers.datetime = flows.flow_runs.datetime = Later
lost = client.create_flow_run_from_deployment(key)
client.set_flow_run_state(lost.id, Running(), force=True)
def to_come():
    due = sorted(client.read_flow_runs(), key=lambda run: run.expected_start_time)
    soon = datetime.now(UTC) + timedelta(minutes=1)
    return [run for run in due if run.auto_scheduled and run.state.is_scheduled() and run.expected_start_time > soon]
wait_for(lambda: len(to_come()) >= 3, 60, "the server's scheduler, a loop of its own, has been here")
waiting = to_come()
first = waiting.pop(0)
Later.at = first.expected_start_time + timedelta(minutes=1)
flows.flow_runs.flow_run, flows.flow_runs.deployment = SimpleNamespace(id=str(lost.id)), SimpleNamespace(id=str(key))
def at_the_end_of_a_run():
    flows.flow_runs.skip_due_meanwhile()
    return client.read_flow_run(first.id).state.name
with pytest.MonkeyPatch.context() as patch:
    rules = SimpleNamespace(concurrency_options=SimpleNamespace(collision_strategy=ConcurrencyLimitStrategy.ENQUEUE))
    patch.setattr(SyncPrefectClient, "read_deployment", lambda *_: rules)
    skipped = [at_the_end_of_a_run()]
skipped.append(at_the_end_of_a_run())
lines = []
Later.at = waiting[-1].expected_start_time
flows.leftovers.tidy(lines.append)
print(json.dumps({
    "lost": client.read_flow_run(lost.id).state.type.value,
    "due": [client.read_flow_run(run.id).state.name for run in waiting], "lines": len(lines),
    "skipped": skipped,
}))
"""
)
TAKEN_UP = """
import json, sys
from uuid import UUID
from prefect.client.orchestration import get_client
from prefect.states import Pending
with get_client(sync_client=True) as client:
    begin = client.create_flow_run_from_deployment
    print(json.dumps([str(begin(UUID(key), state=Pending(name="Submitting")).id) for key in sys.argv[1:]]))
"""
STATES = """
import json, sys
from uuid import UUID
from prefect.client.orchestration import get_client
with get_client(sync_client=True) as client:
    print(json.dumps([client.read_flow_run(UUID(key)).state.type.value for key in sys.argv[1:]]))
"""
DELETE = """
import sys
from uuid import UUID
from prefect.client.orchestration import get_client
with get_client(sync_client=True) as client:
    client.delete_deployment(UUID(sys.argv[1]))
"""


def test_a_deployment_is_cared_for(counting_project: Path) -> None:
    """One server for all of it: starting one takes longer than what is seen here."""
    project = counting_project
    (project / "profiles").mkdir()
    (project / "profiles/small.yaml").write_text("seed: 1\n")
    for command in (("add", "-A"), ("commit", "-q", "-m", "profile")):
        subprocess.run(("git", *command), cwd=project, check=True, env=os.environ | {"GIT_CONFIG_GLOBAL": "/dev/null"})
    try:
        key = json.loads(rlhf(project, "deploy", "--name", "hand", "--profile", "small", "--json"))["id"]
        seen = json.loads(on_server(project, RETRY, key))
        assert (seen["first"], seen["second"], seen["message"][:8]) == ("CANCELLED", "COMPLETED", "3 stages")
        assert seen["folders"] == [seen["name"]]
        assert seen["name"].startswith("small-2")
        assert set(seen["tags"]) == {"rlhf", "profile:small"}
        assert (seen["kept"], seen["stages"]["first"]) == (True, "unchanged"), "what was done is not done again"

        nightly = ("deploy", "--name", "nightly", "--interval", "3600", "--timezone", "Europe/Berlin", "--json")
        late = json.loads(rlhf(project, *nightly))["id"]
        left = json.loads(on_server(project, LEFT, late))
        assert left["skipped"] == ["Scheduled", "Skipped"], "what came due while a run was at work, by its rule"
        *missed, newest = left["due"]
        assert set(missed) == {"Missed"}
        assert (left["lost"], newest, left["lines"]) == ("CRASHED", "Scheduled", 2)

        listed = {one["name"]: one for one in json.loads(rlhf(project, "deploy", "--list", "--json"))}
        assert {name: (one["schedule"], one["profile"]) for name, one in listed.items()} == {
            "hand": ("by hand", "small"),
            "nightly": ("every 3600 s", None),
        }
        taken_up = json.loads(on_server(project, TAKEN_UP, late, key))
        assert json.loads(rlhf(project, "deploy", "--delete", "nightly", "--json")) == {"deleted": "nightly"}
        assert json.loads(on_server(project, STATES, *taken_up)) == ["CANCELLED", "PENDING"], "a place is free again"
        assert [one["name"] for one in json.loads(rlhf(project, "deploy", "--list", "--json"))] == ["hand"]
        on_server(project, DELETE, key)  # as the Prefect page does
        rlhf(project, "up")
        assert json.loads(on_server(project, STATES, *taken_up)) == ["CANCELLED", "CANCELLED"]
    finally:
        rlhf(project, "down")
