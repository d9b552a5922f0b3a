"""Deployments at their limits, with a real server and worker: time, tries, runs at a time, a busy server, the form."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.browser import browser, needs_browser
from support.front import busy_front

from flows.local.servers import known_servers
from tests.flows.conftest import on_server, plain_environment, wait_for
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
    return json.loads(on_server(served_project, PLAY, *keys))


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


ASK = """
import json, sys
from uuid import UUID
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName, LogFilter, LogFilterFlowRunId
with get_client(sync_client=True) as client:
    runs = client.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(like_=sys.argv[1])))
    wanted = FlowRunFilter(id={"any_": [run.id for run in runs]})
    print(json.dumps({
        "states": [run.state.name for run in runs], "messages": [run.state.message for run in runs],
        "tasks": {task.name: task.state.name for task in client.read_task_runs(flow_run_filter=wanted)},
        "artifacts": sorted({one.key for one in client.read_artifacts(flow_run_filter=wanted)}),
        "lines": [line.message for line in client.read_logs(LogFilter(flow_run_id={"any_": [run.id for run in runs]}))],
        "levels": [line.level for line in client.read_logs(LogFilter(flow_run_id={"any_": [run.id for run in runs]}))],
    }))
"""


BEGIN_WRONG = """
import json, sys
from uuid import UUID
from prefect.client.orchestration import get_client
with get_client(sync_client=True) as client:
    wish = {"run": {"name": "wrong-key", "overrides": ["sft.max_stepz=2"]}}
    print(json.dumps({"name": client.create_flow_run_from_deployment(UUID(sys.argv[1]), parameters=wish).name}))
"""


def run_behind(front_url: str, project: Path, name: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli.app", "run", "--name", name, "--set", "sft.max_steps=2", "--json"]
    environment = plain_environment(PREFECT_API_URL=f"{front_url}/api")
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)


def test_nothing_is_lost_behind_a_front_that_is_busy_now_and_then(served_project: Path) -> None:
    """Each kind of write is refused at first; artifacts longer than Prefect's client tries by itself."""
    port = known_servers(served_project)["prefect"].port

    def busy(kind: str, number: int) -> bool:
        return number <= (8 if "artifacts" in kind else 3)

    with busy_front(port, busy) as front:
        done = run_behind(front.url, served_project, "busy-front")
    assert done.returncode == 0, done.stderr
    refused = {kind: number for kind, number in front.refused.items() if number}
    assert {"POST /api/flow_runs/", "POST /api/flow_runs/ID/set_state", "POST /api/logs/"} <= set(refused)
    assert refused["POST /api/artifacts/"] == 8
    seen = json.loads(on_server(served_project, ASK, "busy-front"))
    assert seen["states"] == ["Completed"]
    assert seen["tasks"] == dict.fromkeys(("first", "second@ppo", "second@dpo"), "Completed")
    stages = [f"{stage}-{what}" for stage in ("first", "second-dpo", "second-ppo") for what in ("metrics", "stage")]
    assert seen["artifacts"] == sorted([*stages, "run-summary"])
    assert seen["lines"].count("counting") == 3


def test_a_server_that_stays_busy_is_one_line(served_project: Path) -> None:
    """At the beginning nothing has run; at the end everything has, and the run is done."""
    port = known_servers(served_project)["prefect"].port
    with busy_front(port, lambda kind, number: "set_state" in kind) as front:
        none = run_behind(front.url, served_project, "busy-first")
    assert none.returncode == 7, none.stderr
    assert "503 Service Unavailable" in none.stderr.splitlines()[-1]
    assert "Traceback" not in none.stderr
    with busy_front(port, lambda kind, number: "set_state" in kind and number > 1) as front:
        done = run_behind(front.url, served_project, "busy-last")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "done"
    assert "warning: the end of this run is not noted in Prefect" in done.stderr
    assert "Traceback" not in done.stderr


@needs_browser
def test_the_form_offers_profiles_and_refuses_what_it_can_see(served_project: Path) -> None:
    (served_project / "profiles").mkdir(exist_ok=True)
    for name in ("small", "big"):
        (served_project / f"profiles/{name}.yaml").write_text("seed: 1\n")
    url = json.loads(rlhf(served_project, "deploy", "--name", "form", "--json"))["url"]
    with browser() as chromium:
        page = chromium.new_page(viewport={"width": 1300, "height": 2200})  # the whole form
        page.goto(f"{url}/run")
        page.get_by_text("Profile (Optional)").wait_for()
        page.get_by_text("str", exact=True).first.click()
        choice = page.locator(".p-select-button__control").first
        choice.press("ArrowDown")
        assert page.locator(".p-select-option").all_inner_texts() == ["big", "small"]
        page.get_by_text("small", exact=True).click()
        page.get_by_text("Add item").click()
        override = page.locator("textarea").first

        def refused() -> bool:
            """The form takes up what is typed a moment later, so this may have to be done again."""
            override.fill("rubbish")
            page.wait_for_timeout(1500)
            page.get_by_role("button", name="Submit").click()
            page.wait_for_timeout(500)
            return page.get_by_text("'rubbish' does not match").count() > 0

        wait_for(refused, 20, "the form refuses it")
        assert page.url == f"{url}/run"


def test_what_the_form_cannot_see_fails_the_run_with_one_line(served_project: Path) -> None:
    key = json.loads(rlhf(served_project, "deploy", "--name", "wrong", "--json"))["id"]
    on_server(served_project, BEGIN_WRONG, key)

    def ended() -> dict[str, Any] | None:
        seen = json.loads(on_server(served_project, ASK, "wrong-key"))
        return seen if seen["states"] == ["Failed"] and 40 in seen["levels"] else None  # its log comes a moment later

    wait_for(ended, 60, "the run ends and says why")
    seen = ended()
    assert seen is not None
    assert "sft.max_stepz" in seen["messages"][0]
    assert [line for line, level in zip(seen["lines"], seen["levels"], strict=True) if level >= 40] == seen["messages"]
