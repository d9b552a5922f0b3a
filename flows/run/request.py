"""What a run is asked for, and everything that is checked before anything starts."""

import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from ruamel.yaml import YAML

from flows.root import find_root
from flows.run.names import run_name
from flows.run.selection import chosen_stages
from flows.run.summary import LIVE_FILE, read_summary
from rlhf_core.config import Params
from rlhf_core.data.reading.kinds import SPECS
from rlhf_core.data.reading.readers import format_suffix
from rlhf_core.errors import ConfigError, DataError, EnvironmentProblem
from rlhf_core.state.atomic import write_json
from tasks import paths
from tasks.frame.definition import DVC_FILE
from tasks.lineage.model_folders import check_model_folders
from tasks.params import load_params, resolve_params

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Override = Annotated[str, StringConstraints(pattern=r"^[a-z_0-9]+(\.[a-z_0-9]+)*=.+$")]
StageName = Annotated[str, StringConstraints(pattern=r"^[a-z_]+(@[a-z_]+)?$")]
FORMS = {
    "profile": "not a profile's name (lower-case letters, digits, dot, dash and underscore; no folder, no .yaml)",
    "name": "not a plain name (lower-case letters, digits, dot, dash and underscore, at most 64; no folder)",
    "overrides": "not of the form section.key=value",
    "from_stage": "not a stage's name, such as reward or align@dpo",
    "until_stage": "not a stage's name, such as reward or align@dpo",
}
RECORD_KINDS = tuple(SPECS)
LEAST_FREE_MIB = 500
MOST_RETRIES = 10
Minutes = Annotated[int, Field(ge=1, le=366 * 24 * 60)]
REQUEST_FILE = paths.STATE / "request.json"  # of a worktree; there from the moment when it is whole


def profiles(home: Path) -> list[str]:
    """Names of the profiles of a checkout."""
    return sorted(path.stem for path in (home / paths.PROFILES).glob("*.yaml"))


def _offer_profiles(schema: dict[str, Any]) -> None:
    """Make the profile a choice in forms: one of the checkout that the form is made in."""
    try:
        names = profiles(find_root(Path.cwd()))
    except ConfigError:
        return
    if names:
        schema["anyOf"] = [{"enum": names, "type": "string"}, {"type": "null"}]


class RunRequest(BaseModel):
    """What to run; empty, it is the checkout as it stands. Shown as a form in the Prefect UI."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    profile: Name | None = Field(
        default=None,
        description="a file of profiles/, without .yaml, laid over params.yaml",
        json_schema_extra=_offer_profiles,
    )
    overrides: tuple[Override, ...] = Field(default=(), description="section.key=value, such as sft.max_steps=100")
    data: dict[str, str] = Field(
        default_factory=dict,
        description=f"a file of one's own for a record kind: {', '.join(RECORD_KINDS)}",
    )
    name: Name | None = Field(
        default=None, description="name of the run and of its folder under runs/; made up when empty"
    )
    stage_timeout_minutes: Minutes | None = Field(
        default=None, description="a stage that takes longer is ended; the run can be resumed"
    )
    from_stage: StageName | None = Field(
        default=None, description="begin at this stage (align means all of them); those before it must be up to date"
    )
    until_stage: StageName | None = Field(default=None, description="end with this stage; what follows is left out")
    run_timeout_minutes: Minutes | None = Field(
        default=None, description="a run that takes longer is ended as a whole; it can be resumed"
    )
    retries: Annotated[int, Field(ge=0, le=MOST_RETRIES)] = Field(
        default=0,
        description="how often a stage is tried again, later and later, after a fault of the machine (exit code 7: "
        "memory, disk, a lock); others do not pass by waiting",
    )

    @property
    def in_place(self) -> bool:
        """Whether it can run in the checkout as it stands."""
        return not (self.profile or self.overrides or self.data or self.name)


def complaint(error: ValidationError) -> tuple[str, Any, str]:
    """What is wrong with a request, for people: field, what was given, and the form that it should have."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    form = FORMS.get(field.partition(".")[0])
    problem = form if form and first["type"] == "string_pattern_mismatch" else first["msg"]
    return field, first["input"], problem


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedRun:
    """A run whose configuration and files were checked.

    Attributes:
        home: main checkout, which holds servers and stores.
        root: where the stages work: `home`, or a worktree below `runs/`.
        name: shown everywhere.
        params: parsed `params.yaml` of `root`.
        request: what was asked for.
    """

    home: Path
    root: Path
    name: str
    params: Params
    request: RunRequest


def prepare_run(root: Path, request: RunRequest) -> PreparedRun:
    """Check a request and make its worktree where it needs one.

    Args:
        root: checkout that the user stands in.
        request: what to run.

    Raises:
        ConfigError: parameters, profile, override, name or a model folder are wrong, or `dvc.yaml` is.
        DataError: a data file is missing or empty.
        EnvironmentProblem: the disk is nearly full, or the worktree cannot be made.
    """
    if request.in_place:
        params = load_params(root / paths.PARAMS)
        check_model_folders(root, (root / paths.PARAMS).read_text())
        request = _remembered(root, request)
        name = root.name if root != paths.home(root) else run_name(request, time.time())
    else:
        home = paths.home(root)
        name = request.name or run_name(request, time.time())
        root = _make_worktree(home, name, request)
        write_json(root / REQUEST_FILE, request.model_dump(mode="json"))
        params = load_params(root / paths.PARAMS)
    if request.from_stage or request.until_stage:  # names; whether the others are up to date is asked with all stages
        chosen_stages(
            root, pipeline_stages(root), first=request.from_stage, last=request.until_stage, changed=frozenset()
        )
    check_data(root, params)
    free = shutil.disk_usage(root).free // 2**20
    if free < LEAST_FREE_MIB:
        raise EnvironmentProblem(f"{root}: {free} MiB free, {LEAST_FREE_MIB} needed. Fix: free some space")
    return PreparedRun(home=paths.home(root), root=root, name=name, params=params, request=request)


def _remembered(root: Path, request: RunRequest) -> RunRequest:
    """What a worktree was made for, with the options of the command that goes on in it; of a checkout, these alone."""
    try:
        made_for = RunRequest.model_validate_json((root / REQUEST_FILE).read_text())
    except (OSError, ValidationError):
        return request
    given = {name: value for name, value in request if name in request.model_fields_set and value is not None}
    summary = read_summary(root / LIVE_FILE)
    if summary is not None and summary.status == "done":  # the part that was asked for is there: now comes the rest
        given = {"from_stage": None, "until_stage": None} | given
    return made_for.model_copy(update=given)


def check_request(home: Path, request: RunRequest) -> tuple[str, dict[str, Path]]:
    """Check what a run with a worktree of its own would use; nothing is made.

    Returns:
        The text of its `params.yaml`, and its data files by record kind.

    Raises:
        ConfigError: profile or override is wrong, or a model folder that they name cannot be used.
        DataError: a data file is missing.
    """
    profile = home / paths.PROFILES / f"{request.profile}.yaml" if request.profile else None
    if profile and not profile.is_file():
        known = ", ".join(profiles(home)) or "none"
        raise ConfigError(f"--profile {request.profile}: no such profile. Fix: one of {known}")
    text = resolve_params(home / paths.PARAMS, profile, request.overrides)
    check_model_folders(home, text)
    return text, {kind: _data_file(kind, path) for kind, path in request.data.items()}


def _make_worktree(home: Path, name: str, request: RunRequest) -> Path:
    text, data = check_request(home, request)
    if (home / paths.RUNS / name).exists():
        raise ConfigError(f"--name {name}: runs/{name} is there already. Fix: rlhf resume {name}, or another name")
    from tasks.lineage.versioning import create_run_worktree

    return create_run_worktree(home, name, text, data)


def _data_file(kind: str, given: str) -> Path:
    if kind not in RECORD_KINDS:
        raise ConfigError(f"--data {kind}={given}: unknown record kind. Fix: one of {', '.join(RECORD_KINDS)}")
    path = Path(given).expanduser()
    path = path if path.is_absolute() else Path.cwd() / path
    if not path.is_file():
        raise DataError(f"--data {kind}={given}: no such file. Fix: path of a JSONL, JSON, CSV or Parquet file")
    try:
        format_suffix(path)
    except DataError as error:
        raise ConfigError(f"--data {kind}={error}") from None
    return path.resolve()


def check_data(root: Path, params: Params) -> None:
    """Make sure that every file that `params.yaml` names is there and not empty.

    Raises:
        DataError: one is missing or empty, or none is named.
    """
    named = {kind: file for kind, file in params.data.model_dump().items() if kind in RECORD_KINDS and file}
    if not named:
        raise DataError(f"{paths.PARAMS}: data: no file is named. Fix: set data.demonstrations or data.comparisons")
    for kind, file in named.items():
        path = root / file
        if not path.is_file():
            tracked = (root / "data.dvc").is_file() and Path(file).parts[0] == paths.DATA.name
            cure = "dvc pull data.dvc" if tracked else f"correct data.{kind}"
            raise DataError(f"{paths.PARAMS}: data.{kind}: {file} is not there. Fix: {cure}")
        if path.stat().st_size == 0:
            raise DataError(f"{file}:1: {kind}: the file is empty. Fix: put one record on each line")


def pipeline_stages(root: Path) -> list[str]:
    """Stages of `dvc.yaml` in its order, a matrix stage once for each of its items.

    The file lists a stage after all that it reads from; tests/flows hold it to that.

    Raises:
        ConfigError: a matrix names a parameter that is not there.
    """
    stages = YAML(typ="safe").load((root / DVC_FILE).read_text())["stages"]
    names: list[str] = []
    for name, body in stages.items():
        matrix = body.get("matrix")
        if matrix is None:
            names.append(name)
            continue
        (items,) = matrix.values()
        names += [f"{name}@{item}" for item in _items(root, items)]
    return names


def _items(root: Path, items: str | Sequence[str]) -> Sequence[str]:
    if not isinstance(items, str):
        return items
    reference = re.fullmatch(r"\$\{([\w.]+)\}", items)
    value: Any = YAML(typ="safe").load((root / paths.PARAMS).read_text())
    for key in reference[1].split(".") if reference else ():
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, list):
        raise ConfigError(f"{DVC_FILE}: matrix: {items} is no list in {paths.PARAMS}. Fix: name a list there")
    return value
