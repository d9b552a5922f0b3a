"""The edge to DVC and git worktrees: folders of their own for runs. `tasks.frame.changes` asks DVC what has changed.

A run that differs from the working copy gets a git worktree under `runs/<name>/` with its own `params.yaml` and data,
sharing the main checkout's DVC cache, so that nobody's files are touched and two runs never meet.
"""

import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from rlhf_core.data.reading.readers import format_suffix
from rlhf_core.errors import ConfigError, EnvironmentProblem
from rlhf_core.state.atomic import write_text
from tasks import paths
from tasks.frame.lock_file import dvc_command, first_line
from tasks.launch import tied
from tasks.lineage.manifest import DATA_FILE, data_hash, git_state
from tasks.lineage.model_folders import copy_model_folders
from tasks.lineage.provenance import file_note_path
from tasks.paths import LOCK

__all__ = [
    "add_worktree",
    "collect_cache",
    "create_run_worktree",
    "data_target",
    "git_state",
    "lock_entry",
    "remove_run_worktree",
    "restore_data",
    "tracked_data_hash",
]

NAME_FORM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def lock_entry(root: Path, stage: str) -> dict[str, Any] | None:
    """What `dvc.lock` records of a stage; None where it never ran."""
    path = root / LOCK
    stages = (YAML(typ="safe").load(path.read_text()) or {}).get("stages", {}) if path.exists() else {}
    entry = stages.get(stage)
    return dict(entry) if entry is not None else None


def tracked_data_hash(root: Path) -> str:
    """DVC's hash of the data that `data.dvc` names; empty where there is none."""
    path = root / DATA_FILE
    return data_hash(path.read_text()) if path.exists() else ""


def data_target(kind: str, source: Path) -> Path:
    """Where a run keeps a data file that a person gave: `data/comparisons.jsonl.gz`, in lower case.

    Raises:
        DataError: no format has the file's name.
    """
    return paths.DATA / (kind + format_suffix(source))


def create_run_worktree(home: Path, name: str, params_text: str, data: Mapping[str, Path]) -> Path:
    """Make `runs/<name>/` from the last commit, with parameters and data of its own, and return it.

    Uncommitted changes of the main checkout are not part of it; the model folders that the parameters name are, as
    copies.

    Args:
        home: main checkout.
        params_text: resolved `params.yaml`; its `data` section is made to name the files of `data`.
        data: record kind -> file; copied to `data_target`. When they are all that the run reads, nothing else is put
            there; else the committed data is restored first.

    Raises:
        ConfigError: the name is no plain name or is taken.
        EnvironmentProblem: git or DVC failed, or the disk is full; nothing is left behind.
    """
    worktree = add_worktree(home, name, "HEAD")
    try:
        copy_model_folders(home, worktree, params_text)
        document = YAML(typ="rt").load(params_text)
        targets = {kind: data_target(kind, source) for kind, source in data.items()}
        section = document.setdefault("data", {}) if targets else document.get("data", {})
        for kind, target in targets.items():
            section[kind] = target.as_posix()
        named = {value for value in section.values() if isinstance(value, str)}
        if named - {target.as_posix() for target in targets.values()} and (worktree / DATA_FILE).exists():
            restore_data(worktree)
        for kind, source in data.items():
            (worktree / targets[kind]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, worktree / targets[kind])
            if file_note_path(source).is_file():
                shutil.copyfile(file_note_path(source), file_note_path(worktree / targets[kind]))
        if data:
            _dvc(worktree, "add", "--quiet", paths.DATA.as_posix())
        write_text(worktree / paths.PARAMS, _dump(document) if targets else params_text)
    except BaseException:
        remove_run_worktree(home, name)
        raise
    return worktree


def add_worktree(home: Path, name: str, commit: str) -> Path:
    """Check `commit` out at `runs/<name>/`, sharing the main checkout's DVC cache and its local remotes.

    Raises:
        ConfigError: the name is no plain name or is taken.
        EnvironmentProblem: git failed, for one because it does not know the commit.
    """
    if not NAME_FORM.fullmatch(name):
        raise ConfigError(
            f"run name {name!r}: not a plain name. Fix: letters, digits, dot, dash, underscore; at most 64"
        )
    worktree = home / paths.RUNS / name
    if worktree.exists():
        raise ConfigError(f"{worktree}: a run of this name is there. Fix: choose another name, or rlhf resume {name}")
    _run(home, "git", "worktree", "prune")
    _run(home, "git", "worktree", "add", "--quiet", "--detach", str(worktree), commit)
    try:
        _forget_figures(worktree)
        _share_cache(home, worktree)
    except BaseException:
        remove_run_worktree(home, name)
        raise
    return worktree


def remove_run_worktree(home: Path, name: str) -> None:
    """Take `runs/<name>/` away with all that is in it; what is not there is no error."""
    worktree = home / paths.RUNS / name
    if worktree.exists():
        shutil.rmtree(worktree)
    _run(home, "git", "worktree", "prune")


def collect_cache(home: Path, worktrees: Sequence[Path], data_files: Collection[str]) -> str:
    """Have DVC drop from the cache what neither the checkout, nor its worktrees, nor some data of the past needs.

    Args:
        home: main checkout.
        worktrees: folders that share its cache.
        data_files: texts of `data.dvc` whose data stays.

    Returns:
        What DVC says.

    Raises:
        EnvironmentProblem: DVC refuses.
    """
    with tempfile.TemporaryDirectory(prefix="rlhf-cache-") as scratch:
        pinned = []
        for number, text in enumerate(sorted(set(data_files))):  # DVC keeps what other projects need: so here are some
            folder = Path(scratch) / str(number)
            (folder / ".dvc").mkdir(parents=True)
            (folder / ".dvc/config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
            (folder / DATA_FILE).write_text(text)
            _share_cache(home, folder)
            pinned.append(folder)
        others = [str(folder) for folder in (*worktrees, *pinned)]
        return _dvc(home, "gc", "--workspace", "--force", *(["--projects", *others] if others else [])).strip()


def restore_data(worktree: Path) -> None:
    """Bring `data/` to what `data.dvc` says, from the cache or else from the remote.

    Raises:
        EnvironmentProblem: neither has it.
    """
    try:
        _dvc(worktree, "checkout", "--quiet", "--force", DATA_FILE.as_posix())
    except EnvironmentProblem:
        _dvc(worktree, "pull", "--quiet", "--force", DATA_FILE.as_posix())


def _forget_figures(worktree: Path) -> None:
    """Take away the figures and curves that the commit carries: what a run's folder holds is of that run."""
    for folder in (paths.METRICS, paths.PLOTS):
        shutil.rmtree(worktree / folder, ignore_errors=True)
    (worktree / paths.HEADLINE).unlink(missing_ok=True)


def _share_cache(home: Path, worktree: Path) -> None:
    """Give a worktree the main checkout's cache and remotes, and the settings of its `.dvc/config.local`."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(home)) as repo:
            local, cache = repo.config.read("local"), repo.cache.local.path
            # a folder beside the main checkout's files, written relative to it: the worktree means the same folder
            urls = {remote: settings["url"] for remote, settings in repo.config["remote"].items()}
            folders = {remote: url for remote, url in urls.items() if Path(url).is_relative_to(home)}
        with Repo(str(worktree)) as repo, repo.config.edit("local") as config:
            for section, values in local.items():
                if values:
                    config.setdefault(section, {}).update(values)
            # `cache.local.path` ends in the folder of DVC's file layout; the setting names the folder above it
            config.setdefault("cache", {})["dir"] = str(Path(cache).parents[1])
            for remote, url in folders.items():
                config.setdefault("remote", {}).setdefault(remote, {})["url"] = url
    except DvcException as error:
        raise EnvironmentProblem(f"{worktree}: DVC cannot be set up ({first_line(error)}). Fix: dvc doctor") from error


def _dvc(root: Path, *arguments: str) -> str:
    return _run(root, *dvc_command(root), *arguments)


def _run(root: Path, *command: str) -> str:
    environment = os.environ | {"DVC_NO_ANALYTICS": "1"}
    program = [shutil.which(command[0]) or command[0], *command[1:]]
    done = subprocess.run(tied(program), cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        errors = [line for line in said if line.startswith(("ERROR:", "fatal:"))] or said or ["no message"]
        shown = " ".join(("dvc", *command[3:]) if command[0] == sys.executable else command)
        raise EnvironmentProblem(f"{root}: {shown}: {errors[-1]}. Fix: run it by hand there; dvc doctor shows more")
    return done.stdout


def _dump(document: Any) -> str:
    text = io.StringIO()
    YAML(typ="rt").dump(document, text)
    return text.getvalue()
