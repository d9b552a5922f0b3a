"""What old runs leave behind, and the rule by which it goes.

Goes: the worktree of a finished run that is not among the newest few; checkpoints of stages that are up to date;
half-made outputs of processes that are gone; the cached log-probabilities of reference models. Stays: whatever a run at
work uses, runs that can be gone on with, every model version, and all data.

DVC's cache is shared by all runs and goes by a rule of its own (`clean_cache`): what the checkout, the runs that stay,
or the data of a registered version needs stays, since a version could not be rebuilt without it.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from flows.run.summary import LIVE_FILE, read_summary
from rlhf_core.errors import EnvironmentProblem
from rlhf_core.state.atomic import abandoned_folders, sweep_temporary
from tasks import paths
from tasks.frame.locks import RunLock, read_owner

Kind = Literal["run", "checkpoints", "half-made outputs", "reference log-probabilities"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Leftover:
    """Something that goes.

    Attributes:
        kind: what it is.
        path: file or folder.
        size: bytes on the disk.
        why: the part of the rule that it falls under.
    """

    kind: Kind
    path: Path
    size: int
    why: str


def leftovers(home: Path, *, keep: int, unfinished: bool = False) -> list[Leftover]:
    """What goes by the rule; nothing is touched.

    Args:
        home: main checkout.
        keep: how many finished runs keep their worktree, the newest first.
        unfinished: whether runs that failed, were interrupted or were asked for in part go too, though they could be
            gone on with.
    """
    old = list(_old_runs(home, keep, unfinished))
    gone = {entry.path for entry in old}
    staying = [home, *(folder for folder in _worktrees(home) if folder not in gone)]
    return [*old, *(entry for folder in staying if read_owner(folder) is None for entry in _of_folder(folder))]


def clean(home: Path, found: Sequence[Leftover]) -> list[Leftover]:
    """Remove what `leftovers` found. What a run has taken up in the meantime stays.

    Returns:
        What is gone now.

    Raises:
        EnvironmentProblem: git or the file system refuses.
    """
    from tasks.lineage.versioning import remove_run_worktree

    for entry in found:
        match entry.kind:
            case "run":
                if read_owner(entry.path) is None:
                    with RunLock(entry.path, "cleaning"):
                        remove_run_worktree(home, entry.path.name)
            case "half-made outputs":
                sweep_temporary(entry.path.parent)
            case _:
                _remove_unless_used(entry.path)
    return [entry for entry in found if not entry.path.exists()]


def clean_cache(home: Path, data_files: Sequence[str]) -> str:
    """Have DVC collect what nothing needs any more from the cache that all runs share; returns what it says.

    Args:
        home: main checkout.
        data_files: texts of `data.dvc` whose data must stay: those of the registered versions.

    Raises:
        EnvironmentProblem: a run is at work, or DVC refuses.
    """
    for folder in (home, *_worktrees(home)):
        if owner := read_owner(folder):
            raise EnvironmentProblem(
                f"{folder}: {owner} is at work and may need what the cache holds. Fix: wait for it"
            )
    from tasks.lineage.versioning import collect_cache

    return collect_cache(home, _worktrees(home), data_files)


def _worktrees(home: Path) -> list[Path]:
    return sorted(path for path in (home / paths.RUNS).glob("*") if (path / ".git").exists())


def _old_runs(home: Path, keep: int, unfinished: bool) -> Iterator[Leftover]:
    finished: list[tuple[float, Path]] = []
    for folder in _worktrees(home):
        summary = read_summary(folder / LIVE_FILE)
        if read_owner(folder) is not None or summary is None:
            continue
        in_part = any(stage.status == "left out" for stage in summary.stages)
        if summary.status == "done" and not in_part:
            finished.append((summary.started, folder))
        elif unfinished:
            how = f"{summary.status} in part" if in_part else summary.status
            yield Leftover(kind="run", path=folder, size=_size(folder), why=f"unfinished ({how})")
    for _, folder in sorted(finished, reverse=True)[keep:]:
        yield Leftover(kind="run", path=folder, size=_size(folder), why=f"finished, and not among the newest {keep}")


def _of_folder(root: Path) -> Iterator[Leftover]:
    """What a folder that stays holds and does not need."""
    kept = sorted((root / paths.CHECKPOINTS).glob("*"))
    if kept:
        from tasks.frame.changes import changed_stages

        needed = {paths.slug(stage) for stage in changed_stages(root)}
        for folder in kept:
            if folder.name not in needed:
                why = "the stage is up to date"
                yield Leftover(kind="checkpoints", path=folder, size=_size(folder), why=why)
    for folder in abandoned_folders(root / paths.STAGING):
        yield Leftover(kind="half-made outputs", path=folder, size=_size(folder), why="its process is gone")
    if (cache := root / paths.REFERENCE_CACHE).is_dir():
        why = "computed again where a stage needs them"
        yield Leftover(kind="reference log-probabilities", path=cache, size=_size(cache), why=why)


def _remove_unless_used(folder: Path) -> None:
    """Remove a stage's checkpoints, or the cache of references, unless a stage that was started alone uses them."""
    root = next(parent.parent for parent in folder.parents if parent.name == paths.STATE.name)
    locks = [root / paths.LOCKS / f"{folder.name}.lock"]
    if folder == root / paths.REFERENCE_CACHE:
        locks = sorted((root / paths.LOCKS).glob("align-*.lock"))
    held = []
    try:
        for path in locks:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path)
            lock.acquire(timeout=0)
            held.append(lock)
        shutil.rmtree(folder)
    except Timeout:
        return
    finally:
        for lock in held:
            lock.release()


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
