"""`rlhf clean`: what old runs leave behind, and the rule by which it goes."""

import json as json_format
import sys
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console

from flows.cli.folding import Column, folding_table
from flows.cli.result import PLAIN_WIDTH
from flows.root import find_root
from flows.run.cleaning import Leftover, clean_cache, leftovers
from flows.run.cleaning import clean as remove
from rlhf_core.errors import ConfigError
from tasks import paths

COLUMNS = (
    Column(title="what"),
    Column(title="where"),
    Column(title="size", right=True),
    Column(title="why", folds=1),
)


def clean(
    *, keep: int = 5, unfinished: bool = False, cache: bool = False, dry_run: bool = False, json: bool = False
) -> int:
    """Remove what old runs leave behind: worktrees of finished runs, checkpoints and outputs that no run needs.

    What a run at work uses, runs that can be gone on with, model versions and data stay.

    Parameters
    ----------
    keep:
        Finished runs whose worktree stays, the newest first.
    unfinished:
        Let runs go too that failed, were interrupted or were asked for in part; rlhf resume could go on with them.
    cache:
        Have DVC drop what neither the checkout, nor a run that stays, nor a registered version's data needs.
    dry_run:
        Say what would go, and touch nothing.
    json:
        Print what went as JSON.
    """
    if keep < 0:
        raise ConfigError(f"--keep {keep}: fewer than none. Fix: 0 or more")
    home = paths.home(find_root(Path.cwd()))
    found = leftovers(home, keep=keep, unfinished=unfinished)
    gone = found if dry_run else remove(home, found)
    stayed = [one for one in found if one not in gone]
    said = ""
    if cache and not dry_run:
        said = clean_cache(home, _data_of_versions(home))
    if json:
        rows = [{"kind": one.kind, "path": str(one.path), "bytes": one.size, "why": one.why} for one in gone]
        in_use = [str(one.path) for one in stayed]
        answer = {"removed": not dry_run, "leftovers": rows, "stayed": in_use, "cache": said}
        print(json_format.dumps(answer, indent=2))
        return 0
    _print(home, gone, dry_run=dry_run)
    for one in stayed:
        print(f"stays, since a run or a stage has taken it up: {one.path.relative_to(home)}")
    if said:
        print(said)
    return 0


def _data_of_versions(home: Path) -> list[str]:
    from tasks.tracking import list_versions, read_manifest

    return [read_manifest(home, str(version))[1]["data"] for version in list_versions(home)]


def _print(home: Path, found: list[Leftover], *, dry_run: bool) -> None:
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    if not found:
        console.print("nothing to remove")
        return
    rows = [
        {
            "what": one.kind,
            "where": one.path.relative_to(home).as_posix(),
            "size": f"{one.size / 2**20:,.1f} MiB",
            "why": one.why,
        }
        for one in found
    ]
    console.print(folding_table(COLUMNS, rows, width=console.width, figures="where", box=SIMPLE_HEAD))
    total = sum(one.size for one in found) / 2**20
    console.print(f"{total:,.1f} MiB {'would go; leave --dry-run out to remove it' if dry_run else 'removed'}")
