"""What a run asks Prefect's server and tells it: its name and folder, what else was due, when to try again."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, FlowRun, State, StateType, TaskRun
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.runtime import deployment, flow_run
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.states import Cancelled

from flows.local.settings import api_address
from flows.run.names import TAG_KINDS, folder_of, run_name
from flows.run.request import MOST_RETRIES, REQUEST_FILE, PreparedRun, RunRequest, prepare_run
from flows.run.summary import StageSummary
from rlhf_core.errors import EnvironmentProblem
from tasks import paths
from tasks.frame.runner import Stop

Missed = Literal["newest", "all"]
RETRY_SECONDS = [10.0, 30.0, 90.0, 300.0]
TELL_SECONDS = (1.0, 3.0, 9.0)


def name_of_flow_run(root: Path, request: RunRequest) -> str:
    """Name of a run under a worker, and of its folder: the one it has already, when it is tried again."""
    before = folder_of(paths.home(root) / paths.RUNS, str(flow_run.id))
    if before is not None:
        return before.name
    due = flow_run.scheduled_start_time or datetime.now(UTC)
    return run_name(request, due.timestamp(), of=str(flow_run.id))


def prepare_flow_run(root: Path, request: RunRequest) -> PreparedRun:
    """A worktree for a run under a worker; when it has one, as after Retry in the UI, that one, to go on in.

    Raises:
        RlhfError: as `flows.run.request.prepare_run`.
    """
    from tasks.lineage.versioning import remove_run_worktree

    name = name_of_flow_run(root, request)
    folder = paths.home(root) / paths.RUNS / name
    if (folder / REQUEST_FILE).exists():
        return prepare_run(folder, RunRequest())
    remove_run_worktree(paths.home(root), name)  # what a kill left of it while it was made
    # a request with a name is never in place, so a scheduled run always has a worktree
    return prepare_run(root, request.model_copy(update={"name": name}))


@contextmanager
def server_answers() -> Iterator[None]:
    """Turn what Prefect's client raises into one line.

    Raises:
        EnvironmentProblem: the server does not answer, or refuses.
    """
    try:
        yield
    except (httpx.HTTPError, PrefectException) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        cure = "rlhf up, or correct PREFECT_API_URL; rlhf doctor"
        raise EnvironmentProblem(f"{api_address()}: the Prefect server: {why[:300]}. Fix: {cure}") from error


@contextmanager
def heartbeats(*, wanted: bool) -> Iterator[None]:
    """Have the flow runs that begin within tell the server now and then that they live, or not.

    A run that begins them waits for the second in which it may end them. One that has nothing to do is over before.
    """
    with temporary_settings({} if wanted else {PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield


def under_worker() -> bool:
    """Whether this flow run is a deployment's. Prefect's own `runtime.deployment` asks the server for it each time."""
    context = FlowRunContext.get()
    return context is not None and context.flow_run is not None and context.flow_run.deployment_id is not None


def drop_others_due() -> None:
    """Cancel the other runs of the same schedule that wait and are due as well.

    They would do the same once more. The newest of them cannot be left to come instead: of a schedule that is quicker
    than a run begins none would ever come.
    """
    with get_client(sync_client=True) as client:
        own = client.read_flow_run(UUID(flow_run.id))
        others = _due(client) if own.auto_scheduled else []
        for run in others:
            cancel_missed(client, run, own)
    if others:
        get_run_logger().info("%d other runs of this schedule were due as well and are left out", len(others))


def skip_due_meanwhile() -> None:
    """Cancel the runs of the same schedule that came due while this one was at work, if they are not to wait for it.

    Prefect's own rule cancels those that begin meanwhile; where the limit over all deployments keeps them from that,
    they would come one after the other once this run has ended.
    """
    with get_client(sync_client=True) as client:
        try:
            rules = client.read_deployment(UUID(deployment.id)).concurrency_options
        except ObjectNotFound:  # deleted meanwhile, and its runs that had not begun
            return
        if rules is None or rules.collision_strategy is not ConcurrencyLimitStrategy.CANCEL_NEW:
            return
        own = client.read_flow_run(UUID(flow_run.id))
        for run in _due(client, since=own.start_time):
            why = f"due while {own.name} was at work (rlhf deploy --collision queue lets it wait)"
            client.set_flow_run_state(run.id, Cancelled(name="Skipped", message=why), force=True)


def _due(client: SyncPrefectClient, since: datetime | None = None) -> list[FlowRun]:
    """Runs of this deployment that its schedule made, that are due, and that nobody has begun."""
    found = client.read_flow_runs(
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[UUID(deployment.id)])),
        flow_run_filter=FlowRunFilter(
            expected_start_time=FlowRunFilterExpectedStartTime(after_=since, before_=datetime.now(UTC)),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
        ),
    )
    return [run for run in found if run.auto_scheduled and run.run_count == 0]  # not one that is to be tried again


def cancel_missed(client: SyncPrefectClient, run: FlowRun, other: FlowRun) -> None:
    """Cancel a run that was due since `other` does the same."""
    why = f"missed; {other.name} comes in its place (rlhf deploy --missed all makes up for each)"
    client.set_flow_run_state(run.id, Cancelled(name="Missed", message=why), force=True)


def newest_of(runs: list[FlowRun]) -> FlowRun | None:
    """The run that is due last; None of none."""
    return max(runs, key=lambda run: run.expected_start_time, default=None)


def retrying(stage: StageSummary, times: int, stop: Stop) -> dict[str, Any]:
    """Options of a stage's task: tried again, later and later, while its fault is one that can pass.

    Prefect is always told of retries, and the condition counts them: told of none, it logs an empty traceback for
    each stage that fails.
    """

    def can_pass(task: object, run: TaskRun, state: State) -> bool:
        passes = stage.exit_code == EnvironmentProblem.exit_code and not stop.requested
        return passes and run.run_count <= times

    return {"retries": MOST_RETRIES, "retry_delay_seconds": RETRY_SECONDS, "retry_condition_fn": can_pass}


def tag_flow_run(run_id: str | None, tags: list[str]) -> None:
    """Give this run its tags, in place of those of the same kind that its deployment gave it."""
    if run_id:
        others = [tag for tag in flow_run.tags if not tag.startswith(TAG_KINDS)]
        with get_client(sync_client=True) as client:
            client.update_flow_run(UUID(run_id), tags=sorted({*others, *tags}))


def tell_server(tell: Callable[[], object], what: str) -> None:
    """Write something to Prefect's server that is for people's eyes only, again where it fails.

    Prefect's client tries again by itself on 429, 502 and 503 (five times, a minute in all); this goes on after that,
    and a write that does not come through is a line in the log and no reason for a run to fail.
    """
    for wait_s in (*TELL_SECONDS, None):
        try:
            tell()
        except (httpx.HTTPError, PrefectException) as error:
            if wait_s is None:
                get_run_logger().warning("%s: not written to the Prefect server (%s)", what, error)
            else:
                time.sleep(wait_s)
        else:
            return
