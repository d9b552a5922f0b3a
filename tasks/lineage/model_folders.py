"""Model folders of one's own that a run reads: which `params.yaml` names, whether they can be used, and their copies.

Git does not carry them (`/models/*` is ignored), so a worktree gets a copy of each that is named by a relative path. A
copy and no link: the run then keeps the bytes that it was made from whatever happens to the folder later, and nobody
writes through it. A folder with an absolute path is read where it lies.
"""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_core.config import ModelConfig
from rlhf_core.config.watched import PLACEHOLDER
from rlhf_core.errors import ConfigError, EnvironmentProblem, RlhfError
from tasks import paths
from tasks.lineage.manifest import flat_params
from tasks.lineage.provenance import UNKNOWN, changed_since, read_file_note, read_provenance

REWARD_MODEL = "generate.best_of.reward_model"
PPO = ("align.ppo", "align.chain.ppo")
WATCHED = {
    "generate": ("generate.models", REWARD_MODEL),
    "align": tuple(f"{ppo}.{key}" for ppo in PPO for key in ("reward_model", "guard.scorer")),
}
"""By stage with a `models_folder`, what it may read there."""
PLACED = ("reward.init", "evaluate.judge_model")
"""Folders that are inputs of their stage by themselves; the placeholder is none."""
MIB = 2**20


class ModelFolder(NamedTuple):
    """A folder and the key of `params.yaml` that names it."""

    key: str
    path: str

    @property
    def is_relative(self) -> bool:
        """Whether it lies in the checkout, and so has to be brought into a worktree."""
        return not Path(self.path).is_absolute()


def model_folders(params: str) -> list[ModelFolder]:
    """The folders that the text of a `params.yaml` names; the placeholder of models from numbers is none."""
    values = flat_params(params)
    found = []
    if values.get("model.source") == "folder":
        found.append(ModelFolder("model.path", str(values.get("model.path", PLACEHOLDER))))
    found += [ModelFolder("generate.models", str(path)) for path in values.get("generate.models") or ()]
    for key in (REWARD_MODEL, *PLACED, *(f"{ppo}.reward_model" for ppo in PPO)):
        if values.get(key) and values[key] != PLACEHOLDER:
            found.append(ModelFolder(key, str(values[key])))
    for ppo in PPO:
        scorer = str(values.get(f"{ppo}.guard.scorer") or "")
        if values.get(f"{ppo}.guard.every") and scorer and ":" not in scorer:  # with a colon it names a function
            found.append(ModelFolder(f"{ppo}.guard.scorer", scorer))
    return found


def check_model_folders(home: Path, params: str) -> None:
    """Refuse, before anything starts, folders that are not there or hold no model.

    Args:
        home: checkout that relative paths count from.
        params: text of a checked `params.yaml`.

    Raises:
        ConfigError: one line with key, folder and cure; also where `model.path` or a `models_folder` is given and
            nothing of it would be read.
    """
    values = flat_params(params)
    path = values.get("model.path", PLACEHOLDER)
    if values.get("model.source") != "folder" and path != PLACEHOLDER:
        raise ConfigError(
            f"{paths.PARAMS}: model.path: {path} would not be read: model.source is config. "
            f"Fix: --set model.source=folder after it, or model.path: {PLACEHOLDER}"
        )
    folders = model_folders(params)
    for stage, keys in WATCHED.items():
        watched = values.get(f"{stage}.models_folder", PLACEHOLDER)
        if watched != PLACEHOLDER and not any(folder.key in keys for folder in folders):
            raise ConfigError(
                f"{paths.PARAMS}: {stage}.models_folder: {watched} holds no folder that stage {stage} reads, and a "
                f"change in it would make the stage run again. Fix: {stage}.models_folder: {PLACEHOLDER}"
            )
    for folder in folders:
        if folder.is_relative and ".." in Path(folder.path).parts:
            raise ConfigError(
                f"{paths.PARAMS}: {folder.key}: {folder.path} leads out of the checkout, where a worktree has no copy "
                "of it. Fix: an absolute path, or a folder under models/"
            )
        try:
            _check(folder, home / folder.path, values)
        except RlhfError as error:
            raise ConfigError(f"{paths.PARAMS}: {folder.key}: {error}") from error


def folder_notes(root: Path, params: str) -> dict[str, Any]:
    """Where the model folders that `params` names came from, by their paths, for the manifest of what is made of them.

    Each is `key`, then what `tasks.lineage.provenance.Provenance` says without its list of files, and `changed`: files
    that are not as they were fetched. Of a folder without a note only `key` and `source`, which is unknown.
    """
    found = {}
    for folder in model_folders(params):
        note = read_provenance(root / folder.path)
        known = asdict(note) | {"changed": changed_since(root / folder.path, note)} if note else {"source": UNKNOWN}
        found[folder.path] = {"key": folder.key} | {name: value for name, value in known.items() if name != "files"}
    return found


def data_notes(root: Path, params: str) -> dict[str, Any]:
    """Where the data files that `params` names came from, by their paths; those that nobody noted are left out."""
    values = flat_params(params)
    files = {str(values[key]) for key in values if key.startswith("data.") and isinstance(values[key], str)}
    found = {file: read_file_note(root / file) for file in sorted(files) if (root / file).is_file()}
    return {file: note for file, note in found.items() if note is not None}


def copy_model_folders(home: Path, worktree: Path, params: str) -> None:
    """Copy the folders that `params` names by relative paths from the main checkout into a worktree.

    Files that the worktree has from its commit stay; links are followed. What the main checkout lacks is left out.

    Raises:
        EnvironmentProblem: the disk has no room for them.
    """
    wanted = [folder for folder in model_folders(params) if folder.is_relative and (home / folder.path).is_dir()]
    for folder in dict.fromkeys(wanted):
        source, target = home / folder.path, worktree / folder.path
        needed, free = sum(path.stat().st_size for path in _files(source)), shutil.disk_usage(worktree).free
        if needed > free:
            raise EnvironmentProblem(
                f"{worktree}: {folder.key}: a copy of {folder.path} takes {needed // MIB:,} MiB, {free // MIB:,} are "
                "free. Fix: free some space, or name the folder by its absolute path: it is then read where it lies"
            )
        for path in _files(source):
            copy = target / path.relative_to(source)
            if not copy.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                begun = copy.with_name(f".{copy.name}.begun")  # a copy that is broken off never has the file's name
                shutil.copyfile(path, begun)
                begun.replace(copy)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _check(folder: ModelFolder, path: Path, values: Mapping[str, Any]) -> None:
    if not path.exists():
        raise EnvironmentProblem(f"{path}: there is no such folder. Fix: a copy of the folder, or its absolute path")
    from rlhf_core.models.checks import check_policy_folder, check_reward_folder  # torch: seconds
    from rlhf_core.models.scoring.foreign import check_classifier_folder

    defaults = {name: field.default for name, field in ModelConfig.model_fields.items()}
    limits = [int(values.get(f"model.{name}", defaults[name])) for name in ("max_prompt_tokens", "max_response_tokens")]
    match folder.key:
        case "model.path":
            check_policy_folder(path, values.get("model.chat", defaults["chat"]), sum(limits))
        case "generate.models":
            check_policy_folder(path, "auto", sum(limits))
        case "align.ppo.reward_model" | "align.chain.ppo.reward_model":
            check_classifier_folder(path)
        case _:
            check_reward_folder(path, sum(limits))
