"""Where every run of this checkout stands, from files alone: no server is asked, so the answer takes milliseconds."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from flows.cli.progress import Row
from flows.local.servers import known_servers
from flows.run.summary import LIVE_FILE, RunSummary, StageSummary, Verdict, read_summary
from tasks import paths
from tasks.frame.locks import read_owner
from tasks.frame.runner import ProgressFollower


class StageState(BaseModel):
    """One stage now."""

    name: str
    status: str
    step: int | None = None
    total: int | None = None
    tokens_per_s: float | None = None
    left_s: float | None = None
    wall_s: float | None = None
    metrics: dict[str, Any] = {}
    model_version: str | None = None
    message: str = ""


class RunState(BaseModel):
    """One run now.

    Attributes:
        root: its folder, relative to the main checkout; `.` is the checkout itself.
        status: `running`, `done`, `failed`, `interrupted`, or `none` where nothing was ever run.
        resume: command that goes on with it, where there is something to go on with.
    """

    run: str
    root: str
    status: str
    pid: int | None = None
    started: float | None = None
    exit_code: int | None = None
    stages: list[StageState] = []
    verdict: Verdict | None = None
    message: str = ""
    resume: str | None = None


class Status(BaseModel):
    """Everything `rlhf status --json` says."""

    schema_version: int = 1
    runs: list[RunState]
    servers: dict[str, str]
    pending_records: int


def read_status(root: Path) -> Status:
    """Read the state of the main checkout and of all its worktrees, the newest run first."""
    home = paths.home(root)
    folders = [home, *sorted(path for path in (home / paths.RUNS).glob("*") if (path / ".git").exists())]
    states = [_run_state(home, folder) for folder in folders]
    if len(states) > 1:  # a checkout in which nothing was run says nothing beside runs
        states = [state for state in states if state.status != "none"] or states[:1]
    states.sort(key=lambda state: state.started or 0.0, reverse=True)
    servers = {name: server.url or "running" for name, server in known_servers(home).items()}
    return Status(runs=states, servers=servers, pending_records=_pending_records(home))


def interrupted_runs(root: Path) -> list[tuple[Path, RunSummary]]:
    """Runs that can be gone on with, the latest first, with their folders."""
    home = paths.home(root)
    found = []
    for folder in (home, *(home / paths.RUNS).glob("*")):
        summary = read_summary(folder / LIVE_FILE)
        if summary and summary.status != "done" and read_owner(folder) is None:
            found.append((folder, summary))
    return sorted(found, key=lambda entry: entry[1].started, reverse=True)


def _run_state(home: Path, folder: Path) -> RunState:
    summary = read_summary(folder / LIVE_FILE)
    owner = read_owner(folder)
    place = "." if folder == home else folder.relative_to(home).as_posix()
    if summary is None:
        return RunState(run=owner.run if owner else "", root=place, status="running" if owner else "none")
    status: str = summary.status
    if status == "running" and owner is None:
        status = "interrupted"
    resumable = owner is None and status != "done"
    return RunState(
        run=summary.run,
        root=place,
        status="running" if owner else status,
        pid=owner.pid if owner else None,
        started=summary.started,
        exit_code=summary.exit_code,
        stages=[_stage_state(folder, stage, running=owner is not None) for stage in summary.stages],
        verdict=summary.verdict,
        message=summary.message,
        resume=("rlhf resume" if folder == home else f"rlhf resume {folder.name}") if resumable else None,
    )


def _stage_state(folder: Path, stage: StageSummary, *, running: bool) -> StageState:
    state = StageState(
        name=stage.name,
        status=stage.status,
        tokens_per_s=stage.tokens_per_s,
        wall_s=stage.wall_s,
        metrics=stage.metrics,
        model_version=stage.model_version,
        message=stage.message,
    )
    if stage.status == "running":
        row = Row(stage.name)
        follower = ProgressFollower(folder / paths.progress_file(stage.name))
        for event in follower.read():
            if event["event"] == "progress":
                row.take(event)
        follower.close()
        state.tokens_per_s, state.left_s = row.rates() if running else (None, None)
        state.step, state.total, state.metrics = row.step, row.total, dict(row.metrics)
        state.status = "running" if running else "interrupted"
    return state


def _pending_records(home: Path) -> int:
    """Records that wait for the tracking store; the folder is looked into only where there is one."""
    if not (home / paths.STATE / "spool").is_dir():
        return 0
    from tasks.tracking import pending

    return pending(home)
