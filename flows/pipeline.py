"""The pipeline as a Prefect flow: one task run a stage, streamed logs, artifacts, cancelling.

Everything that decides what happens lies elsewhere (`dvc.yaml`, `flows/run/execution.py`); this file shows it to
Prefect and listens to it. Called from the command line the run is prepared already and stands in `CURRENT`; called by a
worker, a worktree is made here.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from queue import SimpleQueue
from uuid import UUID

from prefect import flow, get_run_logger, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.exceptions import TerminationSignal
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import ValidationError

from flows.artifacts import publish_stage, publish_summary
from flows.flow_log import end_in_one_line
from flows.flow_runs import (
    Missed,
    drop_others_due,
    name_of_flow_run,
    prepare_flow_run,
    retrying,
    server_answers,
    skip_due_meanwhile,
    tag_flow_run,
    tell_server,
    under_worker,
)
from flows.local.settings import GPU_TAG
from flows.root import find_root
from flows.run.execution import PipelineRun
from flows.run.names import run_tags
from flows.run.plan import Plan
from flows.run.request import RunRequest, complaint
from flows.run.stage_lines import own_lines
from flows.run.summary import RunStatus, StageSummary
from rlhf_core.errors import ConfigError, RlhfError
from tasks.catalogue import stage_row
from tasks.frame.locks import RunLock
from tasks.frame.runner import Stop, start_forks

FLOW_NAME = "rlhf-pipeline"
CANCEL_POLL_SECONDS = 1.0
MOST_AT_ONCE = 64  # threads that wait for stages; how many stages run is decided by `flows.run.plan`

CURRENT: ContextVar[PipelineRun | None] = ContextVar("current_run", default=None)


def _run_name() -> str:
    """The run's own name; that of a run under a worker says profile, data and date, and is its folder's."""
    current = CURRENT.get()
    if current is not None:
        return current.prepared.name
    try:
        return name_of_flow_run(find_root(Path.cwd()), _request(flow_run.parameters.get("run")))
    except RlhfError:  # said by the run itself, in one line
        return str(flow_run.name or FLOW_NAME)


@flow(
    name=FLOW_NAME,
    flow_run_name=_run_name,
    persist_result=False,
    validate_parameters=False,
    retries=0,
    task_runner=ThreadPoolTaskRunner(max_workers=MOST_AT_ONCE),
)
def pipeline(run: RunRequest = RunRequest(), missed: Missed = "newest") -> State:  # noqa: B008 - it is frozen
    """Run every stage that is not up to date, each after those it reads from, and record what it made.

    Args:
        run: what to run. Empty, it is the checkout as it stands; a scheduled run always has a worktree of its own.
        missed: of scheduled runs that are due at once since everything was down or busy, the newest comes, or all.
    """
    current = CURRENT.get()
    if current is not None:
        return _run_stages(current)
    end_in_one_line()
    state = _run_in_worktree(run, missed)
    if under_worker():
        tell_server(skip_due_meanwhile, "runs that came due meanwhile")
    return state


def _run_in_worktree(run: object, missed: Missed) -> State:
    try:
        if missed == "newest":
            tell_server(drop_others_due, "other runs of this schedule")
        request = _request(run)
        prepared = prepare_flow_run(find_root(Path.cwd()), request)
        with RunLock(prepared.root, prepared.name):
            from tasks.frame.changes import changed_stages

            changed = changed_stages(prepared.root)
            with start_forks(prepared.root, changed) as forks:
                current = PipelineRun(prepared, changed, stop=Stop(), forks=forks)
                CURRENT.set(current)
                return _run_stages(current)
    except RlhfError as error:
        get_run_logger().error("%s", error)
        return Failed(message=str(error))


def _request(run: object) -> RunRequest:
    """What the form holds. Checked here and not by Prefect, which would add a traceback to the line that is needed."""
    try:
        return RunRequest.model_validate(run or {})
    except ValidationError as error:
        field, value, problem = complaint(error)
        place = f"run.{field}" if field else "run"
        raise ConfigError(f"{place}: {value!r}: {problem}. Fix: correct it in the form") from None


@task(name="stage", persist_result=False, retries=0)
def run_stage(name: str) -> State:
    """Bring one stage up to date."""
    current = CURRENT.get()
    if current is None:
        raise RuntimeError("a stage runs inside the pipeline flow only")
    logger = get_run_logger()
    stage = current.run_stage(name, on_line=own_lines(lambda line: logger.info("%s", line)))
    if stage.status in ("done", "unchanged"):
        tell_server(lambda: publish_stage(current, stage), f"artifacts of {name}")
    return _state_of(stage)


def _state_of(stage: StageSummary) -> State:
    match stage.status:
        case "unchanged":
            return Completed(name="Unchanged", message="inputs, code and parameters are as they were")
        case "interrupted":
            return Cancelled(message=stage.message)
        case "failed":
            return Failed(message=f"exit code {stage.exit_code}: {stage.message}")
    return Completed(message=f"{stage.compute_s:.1f} s" if stage.compute_s is not None else None)


def _run_stages(current: PipelineRun) -> State:
    run_id = flow_run.id
    tags = {
        "prefect_flow_run_id": str(run_id or ""),
        "prefect_flow_run_url": str(flow_run.ui_url or ""),
        "started_by": "deployment" if under_worker() else "command line",
    }
    status: RunStatus = "interrupted"
    exit_code, message = 1, "ended by an error of the program"
    try:
        minutes = current.prepared.request.run_timeout_minutes
        with _signals(current.stop), _cancel_watch(run_id, current.stop), _time_limit(minutes, current.stop):
            current.open(tags)
            tell_server(lambda: tag_flow_run(run_id, run_tags(current.prepared.request)), "tags")
            with server_answers():
                ended = list(_run_stages_in_order(current))
        failed = next((stage for stage in ended if stage.status in ("failed", "interrupted")), None)
        if current.stop.requested:
            status, exit_code, message = "interrupted", current.stop.exit_code, f"ended ({current.stop.reason})"
        elif failed is not None:
            status, exit_code, message = "failed", failed.exit_code or 1, failed.message
        else:
            status, exit_code, message = "done", 0, ""
    except RlhfError as error:
        status, exit_code, message = "failed", error.exit_code, str(error)
        get_run_logger().error("%s", error)
    except (KeyboardInterrupt, TerminationSignal):  # a second Ctrl-C, or a worker that ends its runs
        current.stop.request("SIGTERM")
        status, exit_code, message = "interrupted", current.stop.exit_code, f"ended ({current.stop.reason})"
        raise
    finally:
        summary = current.close(status, exit_code, message)
    tell_server(lambda: publish_summary(current), "summary")
    if current.stop.reason == "timeout":
        return Failed(name="TimedOut", message=f"{message}; Retry or `rlhf resume` goes on from here")
    match status:
        case "done":
            return Completed(message=f"{len(summary.stages)} stages, {summary.wall_s:.0f} s")
        case "interrupted":
            return Cancelled(message=f"{message}; Retry or `rlhf resume` goes on from here")
    return Failed(message=message)


def _run_stages_in_order(current: PipelineRun) -> Iterator[StageSummary]:
    """Run every stage as soon as those it reads from are done, side by side as far as the machine allows.

    Yields each as it ends. Once one has failed, or the run is to end, none is started; those at work are waited for,
    since what they make need not be made again.
    """
    plan, ended = Plan.of(current), SimpleQueue[str]()
    running: dict[str, PrefectFuture[State]] = {}
    while True:
        for name in () if current.stop.requested else plan.startable(running):
            running[name] = _start(current, name, ended)
        if not running:
            return
        name = ended.get()
        future = running.pop(name)
        future.wait()  # it has ended; before this its state is what the server says, later than here and by a request
        state = future.state
        stage = current.summary.stage(name)
        if (state.is_failed() or state.is_crashed()) and stage.status not in ("failed", "interrupted"):
            state.result()  # raises what went wrong around the stage
            raise RuntimeError(f"{name}: {state.message}")
        plan.note_end(stage)
        yield stage


def _start(current: PipelineRun, name: str, ended: "SimpleQueue[str]") -> "PrefectFuture[State]":
    row = stage_row(name)
    wants_gpu = current.prepared.params.compute.device != "cpu" and row is not None and row.on_gpu
    named = run_stage.with_options(
        name=name,
        task_run_name=name,
        tags={GPU_TAG} if wants_gpu else set(),
        **retrying(current.summary.stage(name), current.prepared.request.retries, current.stop),
    )
    future = named.submit(name)
    future.add_done_callback(lambda done: ended.put(name))
    return future


@contextmanager
def _signals(stop: Stop) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into an orderly end; a second one ends at once.

    Under a worker Prefect's own handling stays, since the worker tells by it whether a run was cancelled.
    """
    if threading.current_thread() is not threading.main_thread() or flow_run.id is None or under_worker():
        yield
        return

    def on_signal(number: int, frame: object) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.request(signal.Signals(number).name)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _time_limit(minutes: int | None, stop: Stop) -> Iterator[None]:
    """Ask the run to end when it has taken this long."""
    timer = threading.Timer((minutes or 0) * 60.0, stop.request, ["timeout"])
    timer.daemon = True
    if minutes:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _cancel_watch(run_id: str | None, stop: Stop) -> Iterator[None]:
    """Ask the server every second whether somebody cancelled this flow run."""
    over = threading.Event()

    def watch() -> None:
        with get_client(sync_client=True) as client:
            while not over.wait(CANCEL_POLL_SECONDS):
                try:
                    state = client.read_flow_run(UUID(run_id)).state
                except Exception:  # noqa: S112 - a server that is away cancels nothing; ask again
                    continue
                if state is not None and (state.is_cancelling() or state.is_cancelled()):
                    stop.request("cancelled")
                    return

    thread = threading.Thread(target=watch, name="cancel-watch", daemon=True)
    if run_id:
        thread.start()
    try:
        yield
    finally:
        over.set()
