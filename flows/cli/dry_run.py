"""`rlhf run --dry-run`: which stages would run, and why; no server is started and no stage."""

import json as json_format
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console

from flows.cli.folding import Column, folding_table
from flows.cli.result import PLAIN_WIDTH
from flows.run.request import PreparedRun, RunRequest, pipeline_stages, prepare_run
from flows.run.selection import chosen_stages
from tasks import paths

COLUMNS = (Column(title="stage"), Column(title="would"), Column(title="since"))
REASONS_SHOWN = 4


def dry_run(root: Path, request: RunRequest, *, as_json: bool) -> int:
    """Print what `rlhf run` would do.

    Raises:
        ConfigError, DataError, EnvironmentProblem: what the run itself would refuse.
    """
    from tasks.frame.changes import stage_changes

    with prepared_run(root, request) as prepared:
        stages = pipeline_stages(prepared.root)
        changes = stage_changes(prepared.root)
        chosen = chosen_stages(
            prepared.root, stages, first=request.from_stage, last=request.until_stage, changed=changes
        )
    rows = [
        {
            "stage": stage,
            "would": "be left out" if stage not in chosen else "run" if stage in changes else "stay as it is",
            "since": _words(changes.get(stage, ())) if stage in chosen else "",
        }
        for stage in stages
    ]
    if as_json:
        found = [row | {"since": list(changes.get(row["stage"], ()))} for row in rows]
        print(json_format.dumps({"run": prepared.name, "stages": found}, indent=2))
        return 0
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    title = f"run {prepared.name}, not started"
    console.print(folding_table(COLUMNS, rows, width=console.width, figures="since", box=SIMPLE_HEAD, title=title))
    return 0


@contextmanager
def prepared_run(root: Path, request: RunRequest) -> Iterator[PreparedRun]:
    """The run as it would be prepared; a worktree that it needs is taken away again."""
    home = paths.home(root)
    prepared = prepare_run(root, request)
    try:
        yield prepared
    finally:
        if not request.in_place:
            from tasks.lineage.versioning import remove_run_worktree

            remove_run_worktree(home, prepared.root.name)


def _words(reasons: tuple[str, ...]) -> str:
    more = len(reasons) - REASONS_SHOWN
    return ", ".join(reasons[:REASONS_SHOWN]) + (f" and {more} more" if more > 0 else "")
