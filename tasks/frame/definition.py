"""What `dvc.yaml` says of a stage; the stage itself reads it, so that there is one place where inputs are named."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from ruamel.yaml import YAML

from rlhf_core.config import Params
from rlhf_core.errors import ConfigError
from rlhf_core.state.atomic import file_digest, tree_digest
from tasks import paths

DVC_FILE = paths.DVC_FILE
MADE_BY_STAGES = ("artifacts/", "reports/")
_PARAMETER = re.compile(r"\$\{([\w.\[\]-]+)\}")


@dataclass(frozen=True, kw_only=True, slots=True)
class StageDefinition:
    """One stage of `dvc.yaml`, with the matrix item put in.

    Attributes:
        name: `sft`, `align@ppo`.
        deps: files and folders it reads, code among them.
        params: dotted keys of `params.yaml` it depends on.
        outs: files and folders it writes.
    """

    name: str
    deps: tuple[str, ...]
    params: tuple[str, ...]
    outs: tuple[str, ...]


def stage_definition(root: Path, stage: str) -> StageDefinition:
    """Read one stage's definition, with `${section.key}` put in from `params.yaml` or the defaults.

    Raises:
        ConfigError: `dvc.yaml` has no such stage, or is not there.
    """
    if not (root / DVC_FILE).is_file():
        raise ConfigError(f"{root / DVC_FILE}: no such file. Fix: run from the project's root")
    stages = _parsed((root / DVC_FILE).read_text())["stages"]
    name, _, item = stage.partition("@")
    body = stages.get(name)
    if body is None or bool(item) != ("matrix" in body):
        raise ConfigError(f"{DVC_FILE}: no stage {stage!r}. Fix: one of {', '.join(stages)} (align@<algorithm>)")

    def fill(value: str) -> str:
        for variable in body.get("matrix", {}):
            value = value.replace(f"${{item.{variable}}}", item)
        return _PARAMETER.sub(lambda match: str(parameter(root, match[1])), value)

    return StageDefinition(
        name=stage,
        deps=tuple(dict.fromkeys(fill(dep) for dep in body.get("deps", []))),
        params=tuple(fill(key) for key in body.get("params", [])),
        outs=tuple(fill(_path(out)) for key in ("outs", "metrics", "plots") for out in body.get(key, [])),
    )


def stage_settings(definition: StageDefinition, params: Params) -> dict[str, Any]:
    """The parameters that a stage depends on, by the dotted keys that `dvc.yaml` names, each with its value."""
    everything = params.model_dump(mode="json", by_alias=True)
    settings: dict[str, Any] = {}
    for key in definition.params:
        value: Any = everything
        for part in key.split("."):
            value = value[part]
        settings[key] = value
    return settings


def stage_reads(root: Path, stages: Sequence[str]) -> dict[str, frozenset[str]]:
    """Of each stage, those among `stages` that write something it reads. Others are independent of it.

    Raises:
        ConfigError: `dvc.yaml` lacks one of them.
    """
    definitions = {stage: stage_definition(root, stage) for stage in stages}

    read = {stage: [f"{PurePosixPath(dep)}/" for dep in one.deps] for stage, one in definitions.items()}
    written = {stage: [f"{PurePosixPath(out)}/" for out in one.outs] for stage, one in definitions.items()}

    def reads(one: str, other: str) -> bool:
        """Whether something that one reads is, holds, or lies in something that the other writes."""
        return any(dep.startswith(out) or out.startswith(dep) for dep in read[one] for out in written[other])

    return {
        stage: frozenset(other for other in definitions if other != stage and reads(stage, other)) for stage in stages
    }


def parameter(root: Path, key: str) -> Any:
    """A parameter as `params.yaml` has it, or its default: unchecked, as the frame of a stage has checked them all."""
    path = root / paths.PARAMS
    given = _parsed(path.read_text()) if path.is_file() else None
    found: Any = given or {}
    default: Any = Params().model_dump(mode="json", by_alias=True)
    for part in re.findall(r"-?\w+", key):  # `combine.members[0]`: names and places, -1 the last
        if part.lstrip("-").isdecimal():
            return found[int(part)]
        default = default[part]
        found = found.get(part, default) if isinstance(found, dict) else default
    return found


@lru_cache(maxsize=8)
def _parsed(text: str) -> Any:
    """The content of a YAML file, to be read only: each stage asks for the same two."""
    return YAML(typ="safe").load(text)


def _path(out: Any) -> str:
    return out if isinstance(out, str) else next(iter(out))


def input_digests(root: Path, definition: StageDefinition) -> dict[str, str]:
    """SHA-256 of every input file of a stage by its path; byte-compiled Python is no input."""
    digests: dict[str, str] = {}
    for dep in definition.deps:
        path = root / dep
        if path.is_dir():
            digests |= {
                f"{dep}/{name}": value for name, value in tree_digest(path).items() if "__pycache__" not in name
            }
        elif path.is_file():
            digests[dep] = file_digest(path)
        else:
            made = dep.startswith(MADE_BY_STAGES)
            cure = f"dvc repro {definition.name}" if made else f"git checkout {dep}, dvc pull, or put it there"
            raise ConfigError(f"{dep}: stage {definition.name} needs it and it is not there. Fix: {cure}")
    return digests
