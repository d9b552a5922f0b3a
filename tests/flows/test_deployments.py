"""The pipeline on a schedule: a run that Prefect makes by itself is seen to happen."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.local.servers import known_servers
from tests.flows.conftest import on_server, plain_environment, set_steps, wait_for

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
ASK = """
import json, sys
from uuid import UUID
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.sorting import FlowRunSort
with get_client(sync_client=True) as client:
    key = UUID(sys.argv[1])
    deployment = client.read_deployment(key)
    runs = client.read_flow_runs(
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[key])), sort=FlowRunSort.EXPECTED_START_TIME_ASC
    )
    print(json.dumps({
        "schema": deployment.parameter_openapi_schema, "description": deployment.description,
        "active": [one.active for one in deployment.schedules], "enforced": deployment.enforce_parameter_schema,
        "runs": [[run.name, run.state.type.value, run.auto_scheduled, run.state.message] for run in runs],
    }))
"""
START_WRONG = """
import sys
from uuid import UUID
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectHTTPStatusError
with get_client(sync_client=True) as client:
    try:
        client.create_flow_run_from_deployment(UUID(sys.argv[1]), parameters={"run": {"overrides": ["rubbish"]}})
    except PrefectHTTPStatusError as error:
        print(error.response.status_code)
"""


DEAD_PROXY = {"http_proxy": "http://127.0.0.1:9", "ALL_PROXY": "http://127.0.0.1:9", "NO_PROXY": "", "no_proxy": ""}


def rlhf(project: Path, *arguments: str) -> str:
    """Every command, and so the worker and its runs, has a proxy in its environment through which nothing comes."""
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli.app", *arguments],
        cwd=project,
        env=plain_environment(**DEAD_PROXY),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_scheduled_run_happens_in_a_worktree_of_its_own(served_project: Path) -> None:
    set_steps(served_project, 3)
    before = (served_project / "params.yaml").read_bytes()
    deploy = ("deploy", "--name", "nightly", "--interval", "5", "--set", "sft.max_steps=2", "--json")
    try:
        key = json.loads(rlhf(served_project, *deploy))["id"]

        def finished() -> list:
            runs = json.loads(on_server(served_project, ASK, key))["runs"]
            failed = [run for run in runs if run[1] in ("FAILED", "CRASHED")]
            assert not failed, failed
            return [run for run in runs if run[1] == "COMPLETED"]

        wait_for(finished, 120, "a scheduled run completes")
    finally:
        paused = json.loads(rlhf(served_project, *deploy, "--paused"))
    name, _, by_schedule, _ = finished()[0]
    assert by_schedule is True
    worktree = served_project / "runs" / name
    assert (worktree / "artifacts/first/result.txt").read_text() == "first counted to 2"
    assert json.loads((worktree / "reports/summary.json").read_text())["status"] == "done"
    assert (served_project / "params.yaml").read_bytes() == before

    assert paused["id"] == key
    seen = json.loads(on_server(served_project, ASK, key))
    assert seen["active"] == [False]
    assert seen["enforced"] is True
    assert "git worktree" in seen["description"]
    form = seen["schema"]["definitions"]["RunRequest"]["properties"]
    assert {"profile", "overrides", "data"} <= set(form)
    assert all(field["description"] for field in form.values())
    assert on_server(served_project, START_WRONG, key).strip() == "409"


CANCEL_A_RUN = """
import sys, time
from pathlib import Path
from uuid import UUID
from prefect.client.orchestration import get_client
from prefect.states import Cancelling
from tests.flows.conftest import processes_in, wait_for
runs = Path.cwd() / "runs"
def counting():
    return any('"progress"' in path.read_text() for path in runs.glob("long-*/.rlhf/progress/first.jsonl"))
with get_client(sync_client=True) as client:
    wish = {"run": {"name": "long", "overrides": ["sft.max_steps=3000"]}}
    run = client.create_flow_run_from_deployment(UUID(sys.argv[1]), parameters=wish)
    wait_for(counting, 90, "the stage counts")
    client.set_flow_run_state(run.id, Cancelling(), force=True)
    wait_for(lambda: not processes_in(runs), 5, "the stage's processes end")
    wait_for(lambda: client.read_flow_run(run.id).state.is_cancelled(), 20, "the state says so")
    print("cancelled")
"""


def test_cancelling_a_run_of_the_worker_ends_its_stage(served_project: Path) -> None:
    key = json.loads(rlhf(served_project, "deploy", "--name", "by-hand", "--json"))["id"]
    assert on_server(served_project, CANCEL_A_RUN, key) == "cancelled\n"
    (worktree,) = (served_project / "runs").glob("long-*")
    assert json.loads((worktree / ".rlhf/run.json").read_text())["status"] == "interrupted"
    assert not (worktree / "artifacts/first").exists()


def test_the_worker_is_our_own_process(served_project: Path) -> None:
    servers = known_servers(served_project)
    assert set(servers) == {"prefect", "worker"}
    assert Path(os.readlink(f"/proc/{servers['worker'].pid}/cwd")) == served_project
