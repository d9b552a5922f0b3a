"""Model versions as they are read: found by name, alias or content, with their figures and files."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_core.errors import ConfigError, EnvironmentProblem
from tasks.catalogue import MODEL_NAMES
from tasks.tracking import logged_model
from tasks.tracking.names import OUTPUTS_HASH, STAGE, UNDEFINED, ModelVersion, parse_reference
from tasks.tracking.sqlite_list import versions_in_file
from tasks.tracking.store import Store, first_line, open_store, tracking_uri

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion as MlflowVersion

Metrics = Mapping[str, float | None]
GONE = "RESOURCE_DOES_NOT_EXIST"


def list_versions(root: Path, name: str | None = None) -> list[ModelVersion]:
    """Every version of one model or of all, by name and then number.

    Raises:
        EnvironmentProblem: the store is away.
    """
    names = (name,) if name else MODEL_NAMES
    quick = versions_in_file(tracking_uri(root))
    if quick is not None:
        return [version for version in quick if version.name in names]
    store = open_store(root)
    with answering():
        return [version for each in names for version in versions_of(store, each)]


def resolve_version(root: Path, reference: str) -> ModelVersion:
    """Find the version that `rlhf-policy@candidate` or `rlhf-policy/3` names.

    Raises:
        ConfigError: there is none.
        EnvironmentProblem: the store is away.
    """
    return resolve(open_store(root), reference)


def download_version(root: Path, version: ModelVersion, inside: str, destination: Path) -> Path:
    """Copy one file or folder of a version's logged model below `destination` and return where it lies.

    Raises:
        EnvironmentProblem: it is not there or the store is away.
    """
    return fetch_from_version(open_store(root), version, inside, destination)


def resolve(store: Store, reference: str) -> ModelVersion:
    """`resolve_version` in a store that is open."""
    name, which = parse_reference(reference)
    with answering():
        aliases = aliases_of(store, name)
        number = which if isinstance(which, int) else aliases.get(which)
        found = [version for version in versions_of(store, name) if version.version == number]
    if not found:
        known = ", ".join(f"{name}@{alias}" for alias in sorted(aliases)) or "none yet"
        raise ConfigError(f"{reference}: no such version. Fix: see rlhf models list; aliases there are: {known}")
    return found[0]


@contextmanager
def answering() -> Iterator[None]:
    """Turn what MLflow raises into one line: somebody deleted what is asked for, or the store is away.

    Raises:
        EnvironmentProblem: as said.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        what = "it was deleted in MLflow meanwhile" if error.error_code == GONE else "the registry does not answer"
        raise EnvironmentProblem(f"{first_line(error)} ({what}). Fix: see rlhf models list and rlhf doctor") from error


def aliases_of(store: Store, name: str) -> dict[str, int]:
    """Aliases of a registered model with their version numbers; empty where the model does not exist."""
    from mlflow.exceptions import MlflowException

    try:
        return {alias: int(number) for alias, number in store.client.get_registered_model(name).aliases.items()}
    except MlflowException as error:
        if error.error_code == GONE:
            return {}
        raise EnvironmentProblem(
            f"{name}: the registry does not answer ({first_line(error)}). Fix: see rlhf doctor"
        ) from error


def versions_of(store: Store, name: str, only: str = "") -> list[ModelVersion]:
    """Versions of one registered model, the oldest first; `only` is a further condition in MLflow's search syntax."""
    by_number: dict[int, list[str]] = {}
    for alias, number in aliases_of(store, name).items():
        by_number.setdefault(number, []).append(alias)
    made: list[MlflowVersion] = []
    token = None
    while True:
        page = store.client.search_model_versions(f"name = '{name}'{only}", max_results=1000, page_token=token)
        made += page
        token = page.token
        if not token:
            break
    figures = logged_model.figures_of(store, [logged_model.model_id(version) for version in made])
    found = [plain_version(version, by_number, figures) for version in made]
    return sorted(found, key=lambda version: version.version)


def find_version(store: Store, name: str, content: str) -> ModelVersion | None:
    """The version with this outputs hash, or None."""
    return next(iter(versions_of(store, name, f" AND tags.`{OUTPUTS_HASH}` = '{content}'")), None)


def exists(store: Store, name: str, version: int) -> bool:
    """Whether the registry still has a version: one may be deleted in the MLflow page at any time."""
    from mlflow.exceptions import MlflowException

    try:
        store.client.get_model_version(name, str(version))
    except MlflowException as error:
        if error.error_code == GONE:
            return False
        raise
    return True


def fetch_from_version(store: Store, version: ModelVersion, inside: str, destination: Path) -> Path:
    """`download_version` in a store that is open."""
    from mlflow.artifacts import download_artifacts

    def download() -> str:
        made = store.client.get_model_version(version.name, str(version.version))
        place = store.client.get_logged_model(logged_model.model_id(made)).artifact_location
        return download_artifacts(
            artifact_uri=f"{place}/{inside}".rstrip("/"), dst_path=str(destination), tracking_uri=store.uri
        )

    return _fetch(download, f"{version}: {inside or 'the model'}")


def fetch_evidence(store: Store, version: ModelVersion, path: str, destination: Path) -> Path | None:
    """Copy a file that was attached to a version below `destination`; None where there is none, or its run is gone."""
    from mlflow.exceptions import MlflowException

    folder, _, _ = path.rpartition("/")
    try:
        listed = {item.path for item in store.client.list_artifacts(version.run_id, folder)}
    except MlflowException as error:
        if error.error_code == GONE:
            return None
        raise
    if path not in listed:
        return None
    return _fetch(lambda: store.client.download_artifacts(version.run_id, path, str(destination)), f"{version}: {path}")


def _fetch(download: Callable[[], str], what: str) -> Path:
    try:
        return Path(download())
    except Exception as error:  # storage back ends each have their own kinds
        raise EnvironmentProblem(
            f"{what}: cannot be read ({first_line(error)}). Fix: check the artifact store"
        ) from error


def finite(metrics: Metrics) -> dict[str, float | None]:
    """Figures as numbers, undefined ones as None: no gate may meet a NaN."""
    plain = {key: None if value is None else float(value) for key, value in metrics.items()}
    return {key: value if value is not None and math.isfinite(value) else None for key, value in plain.items()}


def plain_version(
    version: "MlflowVersion", aliases: Mapping[int, Sequence[str]], figures: Mapping[str, Metrics]
) -> ModelVersion:
    """MLflow's version in plain form; figures by logged model."""
    tags = dict(version.tags)
    undefined = [name for name in tags.pop(UNDEFINED, "").split(", ") if name]
    return ModelVersion(
        name=version.name,
        version=int(version.version),
        stage=tags.get(STAGE, ""),
        outputs_hash=tags.get(OUTPUTS_HASH, ""),
        aliases=tuple(sorted(aliases.get(int(version.version), ()))),
        metrics={**figures.get(logged_model.model_id(version), {}), **dict.fromkeys(undefined)},
        tags=tags,
        run_id=version.run_id or "",
        created=version.creation_timestamp / 1000,
    )
