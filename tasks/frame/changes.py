"""What has changed since `dvc.lock`, asked of DVC in process."""

import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_core.errors import ConfigError, EnvironmentProblem
from tasks import paths
from tasks.frame.definition import DVC_FILE, parameter
from tasks.frame.lock_file import first_line, mended

_NOT_NAMED = re.compile(r"Could not find '([\w.]+)'")


def changed_stages(root: Path) -> set[str]:
    """Stages that have to run: they, or one they read from, differ from `dvc.lock` in inputs, parameters or outputs.

    Raises:
        ConfigError: `dvc.yaml` is wrong, or `root` is no DVC repository.
        EnvironmentProblem: another dvc command holds its lock.
    """
    return set(stage_changes(root))


def stage_changes(root: Path) -> dict[str, tuple[str, ...]]:
    """Stages that have to run, each with what has changed in words: `sft.max_steps`, `tasks/stages/sft`, `after sft`.

    A `dvc.lock` that a kill cut off is mended first, with a line to standard error.

    Raises:
        ConfigError: `dvc.yaml` is wrong, `dvc.lock` holds a merge conflict, or `root` is no DVC repository.
        EnvironmentProblem: another dvc command holds its lock.
    """
    from dvc.exceptions import DvcException
    from dvc.lock import LockError

    try:
        try:
            return _ask(root)
        except DvcException:
            note = mended(root)
            if not note:
                raise
            print(f"warning: {note}", file=sys.stderr, flush=True)
            return _ask(root)
    except LockError as error:
        raise EnvironmentProblem(f"{root}: another dvc command is at work here ({error}). Fix: wait for it") from error
    except DvcException as error:
        raise ConfigError(f"{root / DVC_FILE}: {first_line(error)}. Fix: {_cure(root, first_line(error))}") from error


def _ask(root: Path) -> dict[str, tuple[str, ...]]:
    """What `stage_changes` returns; raises what DVC does."""
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

    with Repo(str(root)) as repo:
        graph = repo.index.graph
        # DVC's own names depend on the current folder: dvc.yaml:sft is ../runs/x/dvc.yaml:sft from elsewhere
        names = {stage.addressing: stage.name for stage in graph if isinstance(stage, PipelineStage)}
        reads = {stage.addressing: {before.addressing for before in graph.successors(stage)} for stage in graph}
        status = repo.status()
        changed = _downstream(set(status), reads)
        return {
            names[address]: (
                *_reasons(status.get(address, [])),
                *sorted(f"after {names[other]}" for other in reads[address] & changed if other in names),
            )
            for address in changed
            if address in names
        }


def _cure(root: Path, problem: str) -> str:
    """What to do about an error of DVC's. It knows no defaults: what `dvc.yaml` names must stand in `params.yaml`."""
    missing = _NOT_NAMED.search(problem)
    if missing is None:
        return "correct it; dvc status shows more"
    try:
        return f"name it in {paths.PARAMS}, such as its default: {missing[1]}: {parameter(root, missing[1])}"
    except (KeyError, IndexError):
        return f"correct it: there is no parameter {missing[1]}"


def _reasons(entries: Sequence[Any]) -> Iterator[str]:
    """What DVC's status says of one stage, file by file and parameter by parameter."""
    for entry in entries:
        if isinstance(entry, str):  # `changed command`
            yield entry
            continue
        for kind, items in entry.items():
            for name, state in items.items():
                if isinstance(state, Mapping):  # a parameter file with its keys
                    yield from state
                else:
                    yield f"{name} ({state})" if state != "modified" or kind != "changed deps" else name


def _downstream(changed: set[str], reads: Mapping[str, set[str]]) -> set[str]:
    """`changed` and whatever reads from it, directly or not."""
    reached = set(changed)
    while True:
        more = {name for name, before in reads.items() if name not in reached and before & reached}
        if not more:
            return reached
        reached |= more


def changed_inputs(root: Path, stage: str, among: Collection[str]) -> list[str]:
    """Inputs of a stage that are not what `dvc.lock` records, or are not there; only those `among` are looked at."""
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        found = repo.stage.load_one(path=os.path.join(repo.root_dir, DVC_FILE), name=stage)
        return [dep.def_path for dep in found.deps if dep.def_path in among and dep.workspace_status()]
