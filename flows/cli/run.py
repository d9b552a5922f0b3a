"""`rlhf run` and `rlhf resume`."""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from pydantic import ValidationError

from flows.cli.progress import expected_seconds, watch
from flows.cli.result import print_result
from flows.cli.status import interrupted_runs
from flows.local.servers import Server, ensure_prefect
from flows.local.settings import client_settings, prefect_settings, users_server
from flows.root import find_root
from flows.run.request import PreparedRun, RunRequest, complaint, prepare_run
from flows.run.summary import LIVE_FILE, RunSummary, read_summary
from rlhf_core.errors import ConfigError, EnvironmentProblem
from tasks import paths
from tasks.frame.asked import ChangedStages
from tasks.frame.forked import Forks
from tasks.frame.locks import RunLock
from tasks.frame.runner import Stop, start_forks

if TYPE_CHECKING:
    from flows.run.execution import PipelineRun

OPTIONS = {
    "overrides": "set",
    "stage_timeout_minutes": "timeout",
    "run_timeout_minutes": "run-timeout",
    "from_stage": "from",
    "until_stage": "until",
}
LEAVE_WITHIN_SECONDS = 4.7


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What a run does, and where it ends.

    Parameters
    ----------
    profile:
        A file of profiles/, without .yaml, laid over params.yaml; rlhf profiles lists them.
    set:
        section.key=value; may be given several times.
    data:
        kind=path, such as comparisons=pairs.jsonl.gz; may be given several times.
    name:
        Name of the run and of its folder; left out, it is made from profile and date.
    timeout:
        Minutes after which a stage is ended.
    run_timeout:
        Minutes after which the run is ended as a whole.
    retries:
        How often a stage is tried again after a fault of the machine (exit code 7), later and later.
    from_:
        Begin at this stage, such as reward or align@dpo; those before it must be up to date.
    until:
        End with this stage; what follows is left out.
    """

    profile: str | None = None
    set: Annotated[tuple[str, ...], Parameter(name="--set", negative="", consume_multiple=False)] = ()
    data: Annotated[tuple[str, ...], Parameter(name="--data", negative="", consume_multiple=False)] = ()
    name: str | None = None
    timeout: int | None = None
    run_timeout: int | None = None
    retries: int = 0
    from_: Annotated[str | None, Parameter(name="--from")] = None
    until: str | None = None


def run(*, options: RunOptions = RunOptions(), dry_run: bool = False, json: bool = False) -> int:
    """Run the whole pipeline, or what has changed of it.

    Without options it works in place, on params.yaml and data/ as they stand. With any of profile, set, data or name
    it works in a git worktree of its own, runs/NAME/, and your files stay as they are.

    Parameters
    ----------
    dry_run:
        Say which stages would run and why, and start nothing.
    json:
        Print the summary as JSON.
    """
    request = request_of(options)
    if dry_run:
        from flows.cli.dry_run import dry_run as print_plan

        return print_plan(find_root(Path.cwd()), request, as_json=json)
    return _execute(prepare_run(find_root(Path.cwd()), request), as_json=json)


def resume(name: str | None = None, /, *, json: bool = False) -> int:
    """Go on with a run that was interrupted or failed, or that was asked for in part.

    Parameters
    ----------
    name:
        A run below runs/; without it, the latest that was interrupted or failed.
    json:
        Print the summary as JSON.
    """
    root = find_root(Path.cwd())
    folder = paths.home(root) / paths.RUNS / name if name else None
    found = [place for place, _ in interrupted_runs(root) if folder in (None, place)]
    if found:
        return _execute(prepare_run(found[0], RunRequest()), as_json=json)
    if folder is not None and _in_part(folder):
        return _execute(prepare_run(folder, RunRequest()), as_json=json)
    which = f"runs/{name}" if name else "any run"
    raise ConfigError(f"{which}: nothing to go on with. Fix: rlhf status shows the runs, rlhf run starts one")


def _in_part(folder: Path) -> bool:
    """Whether a run is done but for stages that it was asked to leave out."""
    summary = read_summary(folder / LIVE_FILE)
    return summary is not None and any(stage.status == "left out" for stage in summary.stages)


def request_of(options: RunOptions) -> RunRequest:
    """What the options of a command ask for.

    Raises:
        ConfigError: one of them is not of its form.
    """
    return read_request(
        options.profile,
        options.set,
        options.data,
        options.name,
        stage_timeout_minutes=options.timeout,
        run_timeout_minutes=options.run_timeout,
        retries=options.retries,
        from_stage=options.from_,
        until_stage=options.until,
    )


def read_request(
    profile: str | None, overrides: tuple[str, ...], data: tuple[str, ...], name: str | None, **limits: str | int | None
) -> RunRequest:
    """Check the options of `rlhf run` against the form that the Prefect UI shows.

    Args:
        profile, overrides, data, name: as on the command line.
        limits: other fields of `RunRequest`.

    Raises:
        ConfigError: one of them is not of its form.
    """
    files: dict[str, str] = {}
    for entry in data:
        kind, separator, path = entry.partition("=")
        if not separator or not kind or not path:
            raise ConfigError(f"--data {entry}: not of the form kind=path. Fix: e.g. --data votes=my-votes.jsonl")
        if kind in files:
            raise ConfigError(f"--data {entry}: {kind} is given twice, as {files[kind]} too. Fix: one file of them all")
        files[kind] = path
    given = {"profile": profile, "overrides": overrides, "data": files, "name": name, **limits}
    try:
        return RunRequest.model_validate(given)
    except ValidationError as error:
        field, value, problem = complaint(error)
        head = field.partition(".")[0]
        option = OPTIONS.get(head, head)
        raise ConfigError(f"--{option} {value}: {problem}. Fix: see rlhf run --help") from None


def _execute(prepared: PreparedRun, *, as_json: bool) -> int:
    with RunLock(prepared.root, prepared.name):
        summary = _run_flow(prepared)
    if as_json:
        print(summary.model_dump_json(indent=2))
    elif summary.status == "done":
        print_result(summary, sys.stdout)
    if summary.status != "done":
        again = "rlhf resume" if prepared.root == prepared.home else f"rlhf resume {prepared.root.name}"
        print(f"{summary.message}\nTo go on: {again}", file=sys.stderr)
        if summary.tracking:
            print(f"tracking: {summary.tracking}", file=sys.stderr)
    return summary.exit_code or 0


def _run_flow(prepared: PreparedRun) -> RunSummary:
    with ExitStack() as stack:
        # the server takes seconds to start, Prefect to import, DVC to look at the files: all three side by side
        pool = stack.enter_context(ThreadPoolExecutor(max_workers=2))
        asked = stack.enter_context(ChangedStages(prepared.root))
        print("starting or finding the Prefect server", file=sys.stderr)
        server = pool.submit(_server, prepared.home)
        stages = pool.submit(_changed_and_forks, prepared.root, asked, stack)
        _use(prepared.home, server)
        return _run_stages(prepared, stages)


def _changed_and_forks(root: Path, asked: ChangedStages, stack: ExitStack) -> tuple[set[str], Forks | None]:
    """The stages that have to run, and what will fork them; that begins to import as soon as it is known which."""
    changed = asked.result()
    return changed, stack.enter_context(start_forks(root, changed)) if changed else None


def _run_stages(prepared: PreparedRun, stages_to_run: "Future[tuple[set[str], Forks | None]]") -> RunSummary:
    from flows.flow_runs import heartbeats, server_answers
    from flows.pipeline import CURRENT, pipeline
    from flows.run.execution import PipelineRun

    changed, forks = stages_to_run.result()
    if changed:
        from flows.cli.plan import say_before

        say_before(prepared, changed)
    current = PipelineRun(prepared, changed, stop=Stop(), forks=forks)
    stages = [stage.name for stage in current.summary.stages if stage.name in current.chosen]
    with watch(stages, sys.stderr, expected_seconds(prepared.root, stages, changed)) as view:
        current.observer = view
        _leave_in_time(current)
        token = CURRENT.set(current)
        try:
            with server_answers(), heartbeats(wanted=bool(current.changed)):
                state = pipeline(prepared.request, return_state=True)
        except EnvironmentProblem as error:  # the server took no run, or not its end
            if current.summary.status == "running":
                raise
            print(f"warning: the end of this run is not noted in Prefect: {error}", file=sys.stderr)
            return current.summary
        finally:
            CURRENT.reset(token)
    if current.summary.status == "running":  # Prefect itself failed before the first stage
        raise EnvironmentProblem(f"the flow run ended as {state.name}: {state.message}. Fix: rlhf doctor")
    return current.summary


def _server(home: Path) -> Server | None:
    return None if users_server() else ensure_prefect(home)


def _use(home: Path, server: "Future[Server | None]") -> None:
    """Point this process at the server, before prefect is imported and reads its settings."""
    found = server.result()
    os.environ.update(prefect_settings(home, found.port) if found else client_settings())


def _leave_in_time(current: "PipelineRun", leave: Callable[[int], None] = os._exit) -> None:
    """Once the run is told to end, leave within seconds even where a library waits for something.

    Whatever is cut off is safe: outputs appear whole or not at all, records lie in the spool, and the stage's
    processes die with this one.
    """

    def guard() -> None:
        current.stop.wait()
        threading.Event().wait(LEAVE_WITHIN_SECONDS)
        name = "" if current.root == current.prepared.home else f" {current.root.name}"
        print(f"ended ({current.stop.reason}). To go on: rlhf resume{name}", file=sys.stderr, flush=True)
        leave(current.stop.exit_code)

    threading.Thread(target=guard, name="leave-in-time", daemon=True).start()
