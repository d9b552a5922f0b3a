"""The pipeline as a Prefect deployment: on a schedule that can be paused, or started from a form in the UI.

A run of it happens in a worktree of its own below `runs/`, started by the worker of `rlhf up`.
"""

from pathlib import Path
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy, WorkPool
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.deployments.runner import EntrypointType, RunnerDeployment
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.flows import Flow
from pydantic import BaseModel

from flows.flow_runs import Missed, server_answers
from flows.local.settings import GPU_TAG, POOL, QUEUE
from flows.pipeline import FLOW_NAME, pipeline
from flows.promote import promote_flow, reproduce_flow, rollback_flow
from flows.run.names import run_tags
from flows.run.request import RunRequest
from flows.schedules import Timing, schedule_of
from rlhf_core.errors import ConfigError

DESCRIPTION = """Validate, SFT, reward model, PPO and DPO, A/B evaluation, report.

Each run works in a git worktree of its own below `runs/`, made from the last commit, so nobody's files change.
`profile` is a file of `profiles/`; `overrides` are `section.key=value`; `data` names files of your own by record kind.
What was made is in the MLflow registry as `rlhf-sft`, `rlhf-reward`, `rlhf-policy`. *Retry* goes on where a run ended.
"""


class Listed(BaseModel):
    """A deployment as `rlhf deploy --list` shows it."""

    name: str
    schedule: str
    profile: str | None
    id: UUID


def deploy(
    home: Path, name: str, request: RunRequest, timing: Timing, *, missed: Missed, queue: bool, at_once: int | None
) -> UUID:
    """Create or update the deployment of the pipeline, and those of promotion, rollback and rebuilding.

    Args:
        home: main checkout; the worker starts runs there.
        name: of the pipeline's deployment.
        request: what a run does unless the form says otherwise.
        timing: when it runs by itself.
        missed: of scheduled runs that are due at once, the newest comes, or all.
        queue: whether a run that is due while one is at work waits for it; else it is left out.
        at_once: how many runs of all the pipeline's deployments are at work at a time; None leaves it as it is.

    Returns:
        The id of the pipeline's deployment.

    Raises:
        EnvironmentProblem: Prefect's server does not answer, or refuses.
    """
    schedule = schedule_of(timing)
    collision = ConcurrencyLimitStrategy.ENQUEUE if queue else ConcurrencyLimitStrategy.CANCEL_NEW
    with server_answers():
        ensure_pool(at_once)
        for flow, meaning in (
            (promote_flow, "Make a version champion if it passes the gates"),
            (rollback_flow, "Give champion back to the version before"),
            (reproduce_flow, "Rebuild a version and compare byte for byte"),
        ):
            _by_hand(home, flow, meaning)
        deployment = RunnerDeployment.from_flow(
            pipeline,
            name=name,
            schedules=[schedule] if schedule else [],
            description=DESCRIPTION,
            parameters={"run": request.model_dump(mode="json"), "missed": missed},
            enforce_parameter_schema=True,
            concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=collision),
            tags=["rlhf", *run_tags(request)],
            work_queue_name=QUEUE,
            entrypoint_type=EntrypointType.MODULE_PATH,
            job_variables={"working_dir": str(home)},
        )
        return UUID(str(deployment.apply(work_pool_name=POOL)))


def _by_hand(home: Path, flow: Flow[..., object], meaning: str) -> None:
    RunnerDeployment.from_flow(
        flow,
        name="by-hand",
        description=f"{meaning}; the same as `rlhf models {flow.name.removeprefix('rlhf-')}`.",
        enforce_parameter_schema=True,
        tags=["rlhf"],
        entrypoint_type=EntrypointType.MODULE_PATH,
        job_variables={"working_dir": str(home)},
    ).apply(work_pool_name=POOL)


def ensure_pool(at_once: int | None = None) -> WorkPool:
    """The process pool that the worker takes runs from, with its limits: stages on the GPU, and runs, at a time.

    Runs of the pipeline wait in a queue of their own, so that promotion need not wait for a training.

    Args:
        at_once: runs of the pipeline at a time, over all its deployments; None keeps what is set, at first one.
    """
    with server_answers(), get_client(sync_client=True) as client:
        client.create_concurrency_limit(tag=GPU_TAG, concurrency_limit=1)
        try:
            pool = client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        except ObjectAlreadyExists:
            pool = client.read_work_pool(POOL)
        try:
            client.create_work_queue(QUEUE, concurrency_limit=at_once or 1, work_pool_name=POOL)
        except ObjectAlreadyExists:
            if at_once is not None:
                found = client.read_work_queue_by_name(QUEUE, work_pool_name=POOL)
                client.update_work_queue(found.id, concurrency_limit=at_once)
        return pool


def listed() -> list[Listed]:
    """Every deployment of the pipeline, by name."""
    with server_answers(), get_client(sync_client=True) as client:
        return sorted((_listed(found) for found in pipeline_deployments(client)), key=lambda one: one.name)


def pipeline_deployments(client: SyncPrefectClient) -> list[DeploymentResponse]:
    """Every deployment of the pipeline, page by page."""
    wanted = FlowFilter(name=FlowFilterName(any_=[FLOW_NAME]))
    found: list[DeploymentResponse] = []
    while page := client.read_deployments(flow_filter=wanted, offset=len(found)):
        found += page
    return found


def delete(name: str) -> None:
    """Delete a deployment of the pipeline, and its runs that have not begun.

    Raises:
        ConfigError: there is none of this name.
        EnvironmentProblem: Prefect's server does not answer, or refuses.
    """
    with server_answers(), get_client(sync_client=True) as client:
        try:
            client.delete_deployment(client.read_deployment_by_name(f"{FLOW_NAME}/{name}").id)
        except ObjectNotFound:
            names = sorted(one.name for one in pipeline_deployments(client))
            cure = f"one of {', '.join(names)}" if names else "there is none; rlhf deploy makes one"
            raise ConfigError(f"--delete {name}: no such deployment. Fix: {cure}") from None


def _listed(found: DeploymentResponse) -> Listed:
    times = [_timing(one.schedule, active=one.active) for one in found.schedules]
    paused = ", paused" if found.paused and times else ""
    request = (found.parameters or {}).get("run") or {}
    return Listed(
        name=found.name,
        schedule=" and ".join(times) + paused if times else "by hand",
        profile=request.get("profile"),
        id=found.id,
    )


def _timing(schedule: object, *, active: bool) -> str:
    match schedule:
        case CronSchedule():
            return str(Timing(cron=schedule.cron, timezone=schedule.timezone or "UTC", paused=not active))
        case IntervalSchedule():
            return str(Timing(interval_s=int(schedule.interval.total_seconds()), paused=not active))
    return "a rule of its own" if active else "a rule of its own, paused"
