"""Building a registered version again, from nothing but its manifest, and comparing every file."""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_core.errors import EnvironmentProblem, RlhfError
from rlhf_core.state.atomic import write_text
from tasks import paths
from tasks.frame.changes import changed_inputs
from tasks.frame.forked import Forks
from tasks.frame.runner import Stop, run_stage_process, start_forks
from tasks.lineage.manifest import (
    DATA_FILE,
    SCHEMA,
    bars_promotion,
    locked_inputs,
    output_digests,
    recorded_environment,
    upstream,
)
from tasks.lineage.model_folders import copy_model_folders, model_folders
from tasks.lineage.versioning import add_worktree, remove_run_worktree, restore_data
from tasks.paths import LOCK


@dataclass(frozen=True, kw_only=True, slots=True)
class Reproduction:
    """What a rebuild found.

    Attributes:
        reference: what was rebuilt.
        stages: stages that were run, in their order.
        files: number of files that were compared.
        stage: the first stage with a file that differs; None when all are identical.
        differing: its files that differ, are missing or are new.
        why: what is known to differ between then and now.
        worktree: where the rebuild stands; None when it was identical and is gone.
    """

    reference: str
    stages: tuple[str, ...]
    files: int
    stage: str | None = None
    differing: tuple[str, ...] = ()
    why: tuple[str, ...] = ()
    worktree: Path | None = None

    @property
    def identical(self) -> bool:
        """Whether every file came out the same to the byte."""
        return self.stage is None

    def __str__(self) -> str:
        if self.identical:
            return f"{self.reference}: identical ({self.files} files of {len(self.stages)} stages)"
        shown = ", ".join(self.differing[:3]) + (
            f" and {len(self.differing) - 3} more" if len(self.differing) > 3 else ""
        )
        why = (
            "; ".join(self.why) or "code, data, parameters and environment are the same: the stage itself is not exact"
        )
        return f"{self.reference}: stage {self.stage} differs first: {shown}. Why: {why}. Kept in {self.worktree}"


def reproduce(
    root: Path,
    reference: str,
    manifest: Mapping[str, Any],
    *,
    stop: Stop | None = None,
    on_line: Callable[[str], None] = lambda line: None,
) -> Reproduction:
    """Rebuild the version that a manifest describes in a clean worktree and compare the SHA-256 of every output file.

    Every stage upstream runs anew (no lock, no run cache), each compared as soon as it is done, up to the first that
    differs. The worktree is taken away when all are identical and kept otherwise.

    Args:
        root: any checkout of the project.
        reference: name of the version, for messages.
        manifest: see `tasks.lineage.manifest.build_manifest`.
        stop: ends the rebuild, and the stage that runs, when requested.
        on_line: gets each line that the stages print.

    Raises:
        EnvironmentProblem: the manifest is of another schema, its commit or data cannot be had, a model folder that it
            was made from is gone or was changed, or a stage failed.
    """
    if manifest.get("schema") != SCHEMA:
        raise EnvironmentProblem(
            f"{reference}: its manifest has schema {manifest.get('schema')!r}, this program reads {SCHEMA}. "
            "Fix: rebuild with the version of the program that made it"
        )
    home = paths.home(root)
    name = f"rebuild-{reference.replace('/', '-').replace('@', '-')}-{secrets.token_hex(3)}"
    worktree = _prepare(home, name, reference, manifest)
    # JSON keeps no order of keys that could be relied on; the lock knows which stage reads from which
    order = upstream(manifest["dvc_lock"], manifest["stage"])
    expected: Mapping[str, Mapping[str, str]] = {stage: manifest["outputs"][stage] for stage in order}
    files = 0
    with start_forks(worktree, order) as forks:
        for number, stage in enumerate(order, start=1):
            _run_again(worktree, reference, stage, stop or Stop(), on_line, forks)
            files += len(expected[stage])
            lock = (worktree / LOCK).read_text()
            found = output_digests(worktree, lock, stage)
            differing = {path for path in {*expected[stage], *found} if expected[stage].get(path) != found.get(path)}
            if differing:
                return Reproduction(
                    reference=reference,
                    stages=tuple(order[:number]),
                    files=files,
                    stage=stage,
                    differing=tuple(sorted(differing)),
                    why=(*reasons(manifest), *_other_inputs(manifest["dvc_lock"], lock, stage)),
                    worktree=worktree,
                )
    remove_run_worktree(home, name)
    return Reproduction(reference=reference, stages=tuple(order), files=files)


def _run_again(
    worktree: Path, reference: str, stage: str, stop: Stop, on_line: Callable[[str], None], forks: Forks
) -> None:
    result = run_stage_process(worktree, stage, stop=stop, on_line=on_line, options=("--no-run-cache",), forks=forks)
    if result.exit_code:
        failure = RlhfError(f"{reference}: stage {stage} failed: {result.message}. Kept in {worktree}")
        failure.exit_code = result.exit_code
        raise failure


def reasons(manifest: Mapping[str, Any]) -> list[str]:
    """What differs between the making of a version and now, and may explain other bytes."""
    then: Mapping[str, str] = manifest["environment"]
    now = recorded_environment({"compute": {"threads": then.get("threads", ""), "device": then.get("device", "")}})
    found = [f"{key} was {then.get(key, '?')}, is {now[key]}" for key in now if then.get(key) != now[key]]
    barring = bars_promotion(manifest["git"]["files"])
    if barring:
        found.append(f"it was built with uncommitted changes of {', '.join(barring)}")
    return found


def _other_inputs(then: str, now: str, stage: str) -> list[str]:
    """Inputs that no stage makes and whose content is another one now: code, or a folder of several models."""
    after = locked_inputs(now, stage)
    return [
        f"{path} had other content"
        for path, entry in locked_inputs(then, stage).items()
        if path in after and after[path]["md5"] != entry["md5"]
    ]


def _prepare(home: Path, name: str, reference: str, manifest: Mapping[str, Any]) -> Path:
    worktree = add_worktree(home, name, manifest["git"]["commit"])
    try:
        write_text(worktree / paths.PARAMS, manifest["params"])
        _bring_model_folders(home, worktree, reference, manifest)
        (worktree / LOCK).unlink(missing_ok=True)
        if manifest["data"]:
            write_text(worktree / DATA_FILE, manifest["data"])
            restore_data(worktree)
    except BaseException:
        remove_run_worktree(home, name)
        raise
    return worktree


def _bring_model_folders(home: Path, worktree: Path, reference: str, manifest: Mapping[str, Any]) -> None:
    """Copy the model folders that the version was made from, and hold them against what its `dvc.lock` says of them."""
    lock, folders = manifest["dvc_lock"], model_folders(manifest["params"])
    copy_model_folders(home, worktree, manifest["params"])
    for folder in folders:
        if not (worktree / folder.path).is_dir():
            raise EnvironmentProblem(
                f"{reference}: {folder.key}: {home / folder.path} is gone, and the version was made from it. "
                "Fix: put the folder back as it was"
            )
    write_text(worktree / LOCK, lock)
    keys = {folder.path: folder.key for folder in folders}
    for stage in upstream(lock, manifest["stage"]):
        recorded = {path: entry for path, entry in locked_inputs(lock, stage).items() if path in keys}
        for path in changed_inputs(worktree, stage, recorded) if recorded else ():
            was = recorded[path]
            raise EnvironmentProblem(
                f"{reference}: {keys[path]}: {home / path} was changed since the version was made from it: then it had "
                f"{was['nfiles']} files, {was['size']:,} bytes and DVC's hash {was['md5']}. "
                "Fix: put the folder back as it was"
            )
