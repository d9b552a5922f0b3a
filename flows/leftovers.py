"""What a time without servers leaves in Prefect: runs that nobody carries out any more, and runs that were due."""

from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Crashed

from flows.deployments import pipeline_deployments
from flows.flow_runs import cancel_missed, newest_of, server_answers
from flows.local.settings import POOL

AT_WORK = (StateType.PENDING, StateType.RUNNING, StateType.CANCELLING)
PROC = Path("/proc")


def tidy(print_line: Callable[[str], None]) -> None:
    """Before the worker starts: call runs whose process is gone crashed, and of missed runs leave the newest.

    A run that looks as if it were at work takes a place among the runs at a time for ever, so the next would never
    begin. *Retry* in the UI goes on where it ended.

    Raises:
        EnvironmentProblem: the server does not answer.
    """
    with server_answers(), get_client(sync_client=True) as client:
        for run in _runs(client, AT_WORK):
            if run.deployment_id and not has_process(run.id):
                lost = Crashed(message="its process is gone; Retry goes on where it ended")
                client.set_flow_run_state(run.id, lost, force=True)
                print_line(f"{run.name}: {lost.message}")
        wanted = {one.id for one in pipeline_deployments(client) if (one.parameters or {}).get("missed") != "all"}
        due: dict[UUID, list[FlowRun]] = defaultdict(list)
        for run in _runs(client, (StateType.SCHEDULED,), before=datetime.now(UTC)):
            if run.auto_scheduled and run.deployment_id in wanted and run.run_count == 0:
                due[run.deployment_id].append(run)
        for runs in due.values():
            _leave_newest(client, runs, print_line)


def cancel_without_deployment() -> None:
    """Cancel the runs that wait and whose deployment was deleted, here or in the Prefect page.

    Prefect deletes those that only wait. One that the worker has taken up cannot begin without its deployment either,
    but would stay so, and keep its place among the runs at a time, until the worker is started anew.

    Raises:
        EnvironmentProblem: the server does not answer.
    """
    with server_answers(), get_client(sync_client=True) as client:
        waiting = [run for run in _runs(client, (StateType.SCHEDULED, StateType.PENDING)) if run.deployment_id]
        gone = {key for key in {run.deployment_id for run in waiting} if not _is_there(client, key)}
        for run in waiting:
            if run.deployment_id in gone:
                why = "its deployment was deleted before it began"
                client.set_flow_run_state(run.id, Cancelled(message=why), force=True)


def _is_there(client: SyncPrefectClient, deployment_id: UUID | None) -> bool:
    try:
        return deployment_id is not None and bool(client.read_deployment(deployment_id))
    except ObjectNotFound:
        return False


def _leave_newest(client: SyncPrefectClient, runs: list[FlowRun], print_line: Callable[[str], None]) -> None:
    newest = newest_of(runs)
    for run in runs:
        if run is not newest and newest is not None:
            cancel_missed(client, run, newest)
    if len(runs) > 1:
        print_line(f"{len(runs) - 1} scheduled runs were missed while everything was down; the newest comes")


def has_process(run_id: UUID) -> bool:
    """Whether a process of this machine carries a flow run out: the worker names the run in its environment."""
    mark = f"PREFECT__FLOW_RUN_ID={run_id}".encode()
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    return True
            except OSError:
                continue
    return False


def _runs(client: SyncPrefectClient, states: tuple[StateType, ...], before: datetime | None = None) -> list[FlowRun]:
    """Every run of the pool in one of these states, page by page."""
    state = FlowRunFilterState(type=FlowRunFilterStateType(any_=list(states)))
    time = FlowRunFilterExpectedStartTime(before_=before) if before else None
    found: list[FlowRun] = []
    while page := client.read_flow_runs(
        flow_run_filter=FlowRunFilter(state=state, expected_start_time=time),
        work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL])),
        offset=len(found),
    ):
        found += page
    return found
