"""Where a model came from: everything that is needed to build it again, as one JSON document.

It carries `params.yaml`, `dvc.lock` and `data.dvc` themselves beside the commit, so that a version rebuilds even when
its lock was never committed. Reads files and git alone; imports no dvc, no mlflow, no torch.
"""

import graphlib
import json
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from rlhf_core.errors import EnvironmentProblem
from rlhf_core.state.atomic import digest_of, file_digest, tree_digest
from tasks import paths
from tasks.frame.definition import input_digests, stage_definition
from tasks.paths import LOCK

SCHEMA = 1
DATA_FILE = Path("data.dvc")
CARRIED = frozenset({paths.PARAMS.as_posix(), LOCK.as_posix(), DATA_FILE.as_posix()})
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy", "pyarrow", "dvc")


@dataclass(frozen=True, kw_only=True, slots=True)
class GitState:
    """Commit of a checkout and what differs from it.

    Attributes:
        commit: full hash.
        files: uncommitted files, new ones included, with the SHA-256 of their content; None where a file is deleted.
            Figures and curves, which git keeps although stages write them, are not among them.
    """

    commit: str
    files: Mapping[str, str | None]

    @property
    def digest(self) -> str:
        """`clean`, or a digest of the uncommitted changes."""
        return digest_of(dict(self.files)) if self.files else "clean"


def git_state(root: Path) -> GitState:
    """Read commit and uncommitted changes of a checkout or worktree.

    Raises:
        EnvironmentProblem: `root` is no git checkout or has no commit.
    """
    commit = _git(root, "rev-parse", "--verify", "HEAD").strip()
    listed = _git(root, "status", "--porcelain=v1", "-z", "--untracked-files=all", "--no-renames")
    names = sorted(entry[3:] for entry in listed.split("\0") if entry and not _is_output(Path(entry[3:])))
    return GitState(
        commit=commit,
        files={name: file_digest(root / name) if (root / name).is_file() else None for name in names},
    )


def commit_of(root: Path) -> tuple[str, str]:
    """Commit and branch of a checkout; empty where there is none."""
    try:
        commit = _git(root, "rev-parse", "--verify", "HEAD").strip()
        return commit, _git(root, "rev-parse", "--abbrev-ref", "HEAD").strip()
    except EnvironmentProblem:
        return "", ""


def locked_stage(lock: Path, stage: str) -> dict[str, Any]:
    """What `dvc.lock` says of a stage when it last ran; empty where it says nothing."""
    stages: Mapping[str, Any] = (_yaml(_text(lock)) or {}).get("stages", {})
    return dict(stages.get(stage, {}))


def stage_inputs(lock: Path, stage: str) -> dict[str, str]:
    """What a stage read when it last ran, by DVC's hashes: path -> hash; empty where the lock does not know it."""
    deps = locked_stage(lock, stage).get("deps", [])
    return {str(dep["path"]): str(dep["md5"]) for dep in deps if "md5" in dep}


def bars_promotion(files: Mapping[str, Any] | list[str]) -> list[str]:
    """Uncommitted files that a manifest does not carry: with them a version cannot be built again."""
    return sorted(set(files) - CARRIED)


def build_manifest(root: Path, stage: str) -> dict[str, Any]:
    """Describe how `stage` came about, after it has run.

    Returns:
        `schema`, `stage`, `git` (commit, files), `params`, `dvc_lock`, `data` (texts), `data_hash`, `inputs_hash`,
        `params_hash`, `environment`, `outputs` (stage -> file -> SHA-256, upstream stages first), `metrics`
        (stage -> headline figures).

    Raises:
        EnvironmentProblem: `root` is no git checkout, or `dvc.lock` does not know the stage.
    """
    git, params, lock = git_state(root), _text(root / paths.PARAMS), _text(root / LOCK)
    data = _text(root / DATA_FILE)
    stages = upstream(lock, stage)
    return {
        "schema": SCHEMA,
        "stage": stage,
        "git": {"commit": git.commit, "files": dict(git.files), "digest": git.digest},
        "params": params,
        "params_hash": digest_of(_yaml(params)),
        "dvc_lock": lock,
        "data": data,
        "data_hash": data_hash(data),
        "inputs_hash": digest_of(input_digests(root, stage_definition(root, stage))),
        "environment": recorded_environment(_yaml(params)),
        "outputs": {name: output_digests(root, lock, name) for name in stages},
        "metrics": {name: json.loads(_text(root / paths.metrics_file(name)) or "{}") for name in stages},
    }


def lineage_tags(manifest: Mapping[str, Any]) -> dict[str, str]:
    """What of a manifest is worth searching for in the registry, each short.

    `git_dirty` is `clean` where the manifest carries every uncommitted change itself.
    """
    files = manifest["git"]["files"]
    barring = {name: files[name] for name in bars_promotion(files)}
    return {
        "git_commit": manifest["git"]["commit"],
        "git_dirty": digest_of(barring) if barring else "clean",
        "data_hash": manifest["data_hash"],
        "params_hash": manifest["params_hash"],
    } | _base_model(manifest.get("model_folders", {}))


def _base_model(folders: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The pretrained model that a version comes from, as a tag; none for models from numbers."""
    for path, note in folders.items():
        if note["key"] == "model.path":
            changed = ", changed since" if note.get("changed") else ""
            known = f" {note['commit'][:12]}, licence {note['licence']}{changed}" if "commit" in note else " origin"
            return {"base_model": f"{path}: {note['source']}{known}"}
    return {}


def upstream(lock: str, stage: str) -> list[str]:
    """`stage` and every stage it is made from, each after those it reads, from the text of `dvc.lock`.

    Raises:
        EnvironmentProblem: the lock does not know `stage`.
    """
    order = stage_order(lock)
    if stage not in order:
        raise EnvironmentProblem(f"{LOCK}: no record of stage {stage}. Fix: dvc repro {stage}")
    needed, graph = {stage}, stage_graph(lock)
    for name in reversed(order):
        if name in needed:
            needed |= graph[name]
    return [name for name in order if name in needed]


def stage_order(lock: str) -> list[str]:
    """Every stage of a `dvc.lock`, each after those it reads."""
    return list(graphlib.TopologicalSorter(stage_graph(lock)).static_order())


def stage_graph(lock: str) -> dict[str, set[str]]:
    """Each stage of a `dvc.lock` with the stages whose outputs it reads."""
    stages: Mapping[str, Any] = (_yaml(lock) or {}).get("stages", {})
    outs = {name: [Path(out["path"]) for out in body.get("outs", [])] for name, body in stages.items()}
    graph: dict[str, set[str]] = {}
    for name in sorted(stages):
        reads = [Path(dep["path"]) for dep in stages[name].get("deps", [])]
        graph[name] = {
            other
            for other in sorted(stages)
            if other != name and any(_overlap(read, out) for read in reads for out in outs[other])
        }
    return graph


def locked_inputs(lock: str, stage: str) -> dict[str, Mapping[str, Any]]:
    """Inputs of a stage that no stage makes: path -> its entry in `dvc.lock` (`md5`, `size`, of a folder `nfiles`)."""
    stages: Mapping[str, Any] = _yaml(lock)["stages"]
    made = [Path(out["path"]) for body in stages.values() for out in body.get("outs", [])]
    deps = {dep["path"]: dep for dep in stages[stage].get("deps", [])}
    return {path: entry for path, entry in deps.items() if not any(_overlap(Path(path), out) for out in made)}


def output_digests(root: Path, lock: str, stage: str) -> dict[str, str]:
    """SHA-256 of every file that a stage has as output, by path; files that are not there are left out."""
    digests: dict[str, str] = {}
    for out in _yaml(lock)["stages"][stage].get("outs", []):
        path = root / out["path"]
        if path.is_dir():
            digests |= {f"{out['path']}/{name}": value for name, value in tree_digest(path).items()}
        elif path.is_file():
            digests[out["path"]] = file_digest(path)
    return digests


def data_hash(data: str) -> str:
    """DVC's hash of the data folder, from the text of `data.dvc`; empty where there is none."""
    outs = (_yaml(data) or {}).get("outs", [])
    return str(outs[0].get("md5", "")) if outs else ""


def flat_params(text: str) -> dict[str, Any]:
    """The values of a `params.yaml` by dotted key."""

    def walk(value: Any, before: str) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            return {before: value}
        inner: dict[str, Any] = {}
        for key, item in value.items():
            inner |= walk(item, f"{before}.{key}" if before else str(key))
        return inner

    return walk(_yaml(text) or {}, "")


def recorded_environment(params: Mapping[str, Any] | None) -> dict[str, str]:
    """What the bytes of a result depend on beside code, data and parameters."""
    compute: Mapping[str, Any] = (params or {}).get("compute") or {}
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": _cpu(),
        "threads": str(compute.get("threads", "")),
        "device": str(compute.get("device", "")),
        **{name: _installed(name) for name in LIBRARIES},
    }


def _is_output(path: Path) -> bool:
    return path == paths.HEADLINE or paths.METRICS in path.parents or paths.PLOTS in path.parents


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _cpu() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _overlap(one: Path, other: Path) -> bool:
    return one.is_relative_to(other) or other.is_relative_to(one)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _yaml(text: str) -> Any:
    return YAML(typ="safe").load(text)


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise EnvironmentProblem(
            f"{root}: git {arguments[0]}: {said[-1] if said else 'failed'}. Fix: run in a git checkout with a commit"
        )
    return done.stdout
