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

from flows.cli_servers import has_desktop
from flows.headlines import number, seconds
from flows.result import PLAIN_WIDTH, verdict_line
from flows.runs import find_root
from flows.status import RunState, StageState, read_status
from rlhf_core.errors import EnvironmentProblem
from tasks import paths

REPORT_PAGE = paths.REPORT / "report.html"
COLOURS = {"done": "green", "ok": "green", "unchanged": "cyan", "running": "blue", "warn": "yellow", "fail": "red"}
COLOURS |= {"failed": "red", "interrupted": "yellow"}


def status(*, json: bool = False) -> int:
    """Where every run of this checkout stands. Reads files only, so it answers at once.

    Parameters
    ----------
    json:
        Print everything as JSON.
    """
    found = read_status(find_root(Path.cwd()))
    if json:
        print(found.model_dump_json(indent=2))
        return 0
    console = _console()
    for run in found.runs:
        _print_run(console, run)
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
    page = folder / REPORT_PAGE
    if not page.is_file():
        raise EnvironmentProblem(f"{page}: no report yet. Fix: rlhf run (or rlhf status to see what is missing)")
    print(json_format.dumps({"report": str(page)}) if json else page)
    if has_desktop() and not json:
        webbrowser.open(page.as_uri())
    return 0


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
    from flows.doctor import examine

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
    """Send what the tracking store has not taken yet; each record arrives once.

    Parameters
    ----------
    json:
        Print what was sent as JSON.
    """
    from tasks.tracking import flush

    delivery = flush(find_root(Path.cwd()))
    if json:
        figures = {"sent": delivery.sent, "pending": delivery.pending, "refused": delivery.refused}
        print(json_format.dumps(figures | {"problem": delivery.problem}))
    else:
        print(f"sent {delivery.sent}, waiting {delivery.pending}, refused {delivery.refused}")
    if delivery.pending:
        problem = delivery.problem or "the store did not take everything"
        raise EnvironmentProblem(f"{problem}. Fix: rlhf doctor, then rlhf sync again")
    return 0


def _print_run(console: Console, run: RunState) -> None:
    if run.status == "none":
        console.print("no run yet. Fix: rlhf run")
        return
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.started)) if run.started else ""
    pid = f", process {run.pid}" if run.pid else ""
    console.print(f"run {run.run} ({run.root}): {run.status}, started {since}{pid}")
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("stage", "status", "step", "tokens/s", "left", "time", "model"):
        table.add_column(title)
    for stage in run.stages:
        table.add_row(*_stage_cells(stage))
    console.print(table)
    if run.verdict:
        console.print(verdict_line(run.verdict))
    if run.message:
        console.print(run.message)
    if run.resume:
        console.print(f"to go on: {run.resume}")


def _stage_cells(stage: StageState) -> list[Text | str]:
    rate = number(round(stage.tokens_per_s)) if stage.tokens_per_s else ""
    return [
        stage.name,
        Text(stage.status, COLOURS.get(stage.status, "")),
        f"{stage.step}/{stage.total}" if stage.total else "",
        rate,
        seconds(stage.left_s) if stage.left_s is not None else "",
        seconds(stage.wall_s) if stage.wall_s is not None else "",
        stage.model_version or "",
    ]


def _console() -> Console:
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
