"""`rlhf status`, `report`, `schema`, `doctor`, `sync`: looking, and sending what waits."""

import json as json_format
import sys
import time
import webbrowser
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.cli.folding import Column, folding_table
from flows.cli.result import PLAIN_WIDTH, verdict_line
from flows.cli.servers import has_desktop
from flows.cli.status import RunState, StageState, read_status
from flows.root import find_root
from flows.run.headlines import number, seconds
from flows.run.page import page_of_run
from rlhf_core.errors import ConfigError, EnvironmentProblem
from tasks import paths

COLOURS = {"done": "green", "ok": "green", "unchanged": "cyan", "running": "blue", "warn": "yellow", "fail": "red"}
COLOURS |= {"failed": "red", "interrupted": "yellow"}
RUNS_LISTED = 10
STAGE_COLUMNS = (
    Column(title="stage"),
    Column(title="status"),
    Column(title="step", folds=3, right=True),
    Column(title="tokens/s", folds=1, right=True),
    Column(title="left", folds=4, right=True),
    Column(title="time", folds=5, right=True),
    Column(title="model", folds=2),
)
RUN_COLUMNS = (
    Column(title="run"),
    Column(title="started", folds=2),
    Column(title="status"),
    Column(title="stages", folds=1, right=True),
    Column(title="result"),
)


def status(name: str | None = None, /, *, all: bool = False, json: bool = False) -> int:
    """Where every run of this checkout stands, the newest first. Reads files only, so it answers at once.

    The newest run and whatever is at work are shown stage by stage, the other runs in a line each.

    Parameters
    ----------
    name:
        A run by its name: this one alone, stage by stage.
    all:
        Every run stage by stage.
    json:
        Print everything as JSON.
    """
    found = read_status(find_root(Path.cwd()))
    if name is not None:
        runs = [run for run in found.runs if name in (run.run, Path(run.root).name)]
        if not runs:
            known = ", ".join(run.run for run in found.runs[:RUNS_LISTED] if run.run) or "none yet"
            raise ConfigError(f"{name}: no such run. Fix: one of {known}")
        found = found.model_copy(update={"runs": runs})
    if json:
        print(found.model_dump_json(indent=2))
        return 0
    console = _console()
    full = [run for place, run in enumerate(found.runs) if all or name or place == 0 or run.status == "running"]
    for run in full:
        _print_run(console, run)
    _print_briefly(console, [run for run in found.runs if run not in full])
    servers = ", ".join(f"{name} {url}" for name, url in found.servers.items())
    console.print(f"servers: {servers or 'none'}")
    if found.pending_records:
        console.print(f"{found.pending_records} records wait for the tracking store. Fix: rlhf sync")
    return 0


def report(name: str | None = None, /, *, json: bool = False) -> int:
    """Say where the report of a run is; on a desktop, open it.

    Parameters
    ----------
    name:
        A run below runs/; without it, the checkout or worktree you are in.
    json:
        Print the path as JSON.
    """
    root = find_root(Path.cwd())
    folder = paths.home(root) / paths.RUNS / name if name else root
    page = page_of_run(folder)
    if page is None:
        missing = folder / paths.REPORT_PAGE
        raise EnvironmentProblem(f"{missing}: no report yet. Fix: rlhf run (or rlhf status to see what is missing)")
    if page == folder / paths.REPORT_PAGE:
        print("stages have run since the last run of rlhf: no date, gates or champion on this page", file=sys.stderr)
    print(json_format.dumps({"report": str(page)}) if json else page)
    if has_desktop() and not json:
        webbrowser.open(page.as_uri())
    return 0


def profiles(*, json: bool = False) -> int:
    """The profiles that `rlhf run --profile` takes, each with what it is for.

    Parameters
    ----------
    json:
        Print them as JSON.
    """
    folder = paths.home(find_root(Path.cwd())) / paths.PROFILES
    found = {path.stem: _purpose(path) for path in sorted(folder.glob("*.yaml"))}
    if json:
        print(json_format.dumps(found, indent=2))
        return 0
    if not found:
        raise ConfigError(f"{folder}: no profile there. Fix: see docs/quick-start.md, A profile of your own")
    rows = [{"profile": name, "what it is for": purpose} for name, purpose in found.items()]
    console = _console()
    columns = (Column(title="profile"), Column(title="what it is for"))
    console.print(folding_table(columns, rows, width=console.width, figures="what it is for", box=SIMPLE_HEAD))
    return 0


def _purpose(path: Path) -> str:
    """The first line of a profile's comment that is prose."""
    head = path.read_text(encoding="utf-8").splitlines()[:5]
    comments = [line.removeprefix("#").strip() for line in head if line.startswith("#")]
    return next((line for line in comments if line and not line.startswith("yaml-language-server:")), "").rstrip(":")


def schema() -> int:
    """JSON Schema of params.yaml, for editors."""
    from tasks.reference import json_schema

    print(json_schema(), end="")
    return 0


def doctor(*, json: bool = False) -> int:
    """Check this machine: Python, packages, disk, ports, servers, stores, GPU. Exit code 7 when something fails.

    Parameters
    ----------
    json:
        Print the findings as JSON.
    """
    from flows.run.doctor import examine

    findings = examine(find_root(Path.cwd()))
    if json:
        print(json_format.dumps([finding.model_dump() for finding in findings], indent=2))
    else:
        table = Table(box=None, pad_edge=False, show_header=False)
        for finding in findings:
            cure = f"Fix: {finding.cure}" if finding.cure else ""
            table.add_row(Text(finding.level, COLOURS[finding.level]), finding.what, finding.found, cure)
        _console().print(table)
    return EnvironmentProblem.exit_code if any(finding.level == "fail" for finding in findings) else 0


def sync(*, json: bool = False) -> int:
    """Send what the tracking store has not taken yet, what it refused among it; each record arrives once.

    Parameters
    ----------
    json:
        Print what was sent as JSON.
    """
    from tasks.tracking import flush

    delivery = flush(find_root(Path.cwd()))
    if json:
        figures = {"sent": delivery.sent, "pending": delivery.pending, "refused": list(delivery.refused)}
        print(json_format.dumps(figures | {"cut": list(delivery.cut), "problem": delivery.problem}))
    else:
        print(f"sent {delivery.sent}, waiting {delivery.pending}, refused {len(delivery.refused)}")
    if delivery.pending or delivery.refused:
        raise EnvironmentProblem(str(delivery))
    return 0


def _print_run(console: Console, run: RunState) -> None:
    if run.status == "none":
        console.print("no run yet. Fix: rlhf run")
        return
    pid = f", process {run.pid}" if run.pid else ""
    console.print(f"run {run.run} ({run.root}): {run.status}, started {_since(run)}{pid}")
    rows = [_stage_cells(stage) for stage in run.stages]
    console.print(folding_table(STAGE_COLUMNS, rows, width=console.width, box=SIMPLE_HEAD))
    if run.verdict:
        console.print(verdict_line(run.verdict))
    if run.message:
        console.print(run.message)
    if run.resume:
        console.print(f"to go on: {run.resume}")


def _print_briefly(console: Console, runs: list[RunState]) -> None:
    """A line a run, the newest first; those that do not fit on a page are counted."""
    if not runs:
        return
    rows = [_run_cells(run) for run in runs[:RUNS_LISTED]]
    console.print(folding_table(RUN_COLUMNS, rows, width=console.width, figures="result", box=SIMPLE_HEAD))
    if len(runs) > RUNS_LISTED:
        console.print(f"{len(runs) - RUNS_LISTED} older runs: rlhf status --all")


def _run_cells(run: RunState) -> dict[str, Text | str]:
    done = sum(stage.status in ("done", "unchanged") for stage in run.stages)
    verdict = f"{run.verdict.best}: win rate {run.verdict.win_rate:.3f}" if run.verdict else ""
    return {
        "run": run.run or run.root,
        "started": _since(run),
        "status": Text(run.status, COLOURS.get(run.status, "")),
        "stages": f"{done}/{len(run.stages)}" if run.stages else "",
        "result": verdict if run.status == "done" else run.resume or verdict,
    }


def _since(run: RunState) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(run.started)) if run.started else ""


def _stage_cells(stage: StageState) -> dict[str, Text | str]:
    return {
        "stage": stage.name,
        "status": Text(stage.status, COLOURS.get(stage.status, "")),
        "step": f"{stage.step}/{stage.total}" if stage.total else "",
        "tokens/s": number(round(stage.tokens_per_s)) if stage.tokens_per_s else "",
        "left": seconds(stage.left_s) if stage.left_s is not None else "",
        "time": seconds(stage.wall_s) if stage.wall_s is not None else "",
        "model": stage.model_version or "",
    }


def _console() -> Console:
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
