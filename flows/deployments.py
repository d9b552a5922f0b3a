"""The pipeline as a Prefect deployment: on a schedule that can be paused, or started from a form in the UI.

A run of it happens in a worktree of its own below `runs/`, started by the worker of `rlhf up`.
"""

import re
from datetime import timedelta
from pathlib import Path
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import WorkPool
from prefect.deployments.runner import EntrypointType, RunnerDeployment
from prefect.exceptions import ObjectAlreadyExists
from prefect.schedules import Cron, Interval, Schedule

from flows.pipeline import pipeline
from flows.promote import promote_flow, reproduce_flow, rollback_flow
from flows.runs import RunRequest
from flows.settings import GPU_TAG, POOL
from rlhf_core.errors import ConfigError

DESCRIPTION = """Validate, SFT, reward model, PPO and DPO, A/B evaluation, report.

Each run works in a git worktree of its own below `runs/`, made from the last commit, so nobody's files change.
`profile` is a file of `profiles/`; `overrides` are `section.key=value`; `data` names files of your own by record kind.
What was made is in the MLflow registry as `rlhf-sft`, `rlhf-reward`, `rlhf-policy`.
"""
LEAST_INTERVAL_S = 5
CRON_FORM = re.compile(r"^\S+(\s+\S+){4}$")


def schedule_of(cron: str | None, interval_s: int | None, timezone: str, *, paused: bool) -> Schedule | None:
    """The schedule that the options describe; None for none.

    Raises:
        ConfigError: both are given, or one of them is wrong.
    """
    if cron and interval_s is not None:
        raise ConfigError("--cron and --interval: both given. Fix: give one of them")
    if cron:
        if not CRON_FORM.fullmatch(cron.strip()):
            raise ConfigError(f"--cron {cron!r}: not five fields. Fix: e.g. --cron '0 3 * * *', every night at three")
        try:
            return Cron(cron, timezone=timezone, active=not paused)
        except ValueError as error:
            raise ConfigError(f"--cron {cron!r}: {error}. Fix: e.g. --cron '0 3 * * *'") from None
    if interval_s is not None:
        if interval_s < LEAST_INTERVAL_S:
            raise ConfigError(f"--interval {interval_s}: too short. Fix: {LEAST_INTERVAL_S} seconds or more")
        return Interval(timedelta(seconds=interval_s), timezone=timezone, active=not paused)
    return None


def deploy(home: Path, name: str, request: RunRequest, schedule: Schedule | None) -> UUID:
    """Create or update the deployment of the pipeline, and those of promotion, rollback and rebuilding.

    Args:
        home: main checkout; the worker starts runs there.
        name: of the pipeline's deployment.
        request: what a run does unless the form says otherwise.
        schedule: when it runs by itself.

    Returns:
        The id of the pipeline's deployment.
    """
    ensure_pool()
    for flow, meaning in (
        (promote_flow, "Make a version champion if it passes the gates"),
        (rollback_flow, "Give champion back to the version before"),
        (reproduce_flow, "Rebuild a version and compare byte for byte"),
    ):
        RunnerDeployment.from_flow(
            flow,
            name="by-hand",
            description=f"{meaning}; the same as `rlhf models {flow.name.removeprefix('rlhf-')}`.",
            entrypoint_type=EntrypointType.MODULE_PATH,
            job_variables={"working_dir": str(home)},
        ).apply(work_pool_name=POOL)
    deployment = RunnerDeployment.from_flow(
        pipeline,
        name=name,
        schedules=[schedule] if schedule else [],
        description=DESCRIPTION,
        parameters={"run": request.model_dump(mode="json")},
        enforce_parameter_schema=True,
        concurrency_limit=1,
        tags=["rlhf"],
        entrypoint_type=EntrypointType.MODULE_PATH,
        job_variables={"working_dir": str(home)},
    )
    found = deployment.apply(work_pool_name=POOL)
    return UUID(str(found))


def ensure_pool() -> WorkPool:
    """The process pool that the worker takes runs from, and the limit of one stage on the GPU at a time."""
    with get_client(sync_client=True) as client:
        client.create_concurrency_limit(tag=GPU_TAG, concurrency_limit=1)
        try:
            return client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        except ObjectAlreadyExists:
            return client.read_work_pool(POOL)
