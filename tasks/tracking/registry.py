"""Model versions: registered once by content, found by name, alias or content, with their figures."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML

from rlhf_core.errors import ConfigError, EnvironmentProblem
from rlhf_core.state.atomic import digest_of, tree_digest
from tasks.tracking import logged_model
from tasks.tracking.names import (
    CANDIDATE,
    CANDIDATE_TIME,
    METRICS,
    MODEL_NAMES,
    OUTPUTS_HASH,
    STAGE,
    ModelVersion,
    parse_reference,
)
from tasks.tracking.store import Store, as_default, first_line, lock, open_store

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion as MlflowVersion

REGISTRY_FILE = Path(__file__).parents[2] / "mlflow" / "registry.yaml"
Metrics = Mapping[str, float | None]


class ContentChanged(Exception):
    """A model folder is no longer what was to be registered."""


def outputs_hash(stage: str, folder: Path) -> str:
    """Identity of a model: digest of its stage and of every file of its folder."""
    return digest_of({"stage": stage, "files": tree_digest(folder)})


def list_versions(root: Path, name: str | None = None) -> list[ModelVersion]:
    """Every version of one model or of all, by name and then number.

    Raises:
        EnvironmentProblem: the store is away.
    """
    store = open_store(root)
    return [version for each in ((name,) if name else MODEL_NAMES) for version in versions_of(store, each)]


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
    aliases = aliases_of(store, name)
    number = which if isinstance(which, int) else aliases.get(which)
    found = [version for version in versions_of(store, name) if version.version == number]
    if not found:
        known = ", ".join(f"{name}@{alias}" for alias in sorted(aliases)) or "none yet"
        raise ConfigError(f"{reference}: no such version. Fix: see rlhf models list; aliases there are: {known}")
    return found[0]


def aliases_of(store: Store, name: str) -> dict[str, int]:
    """Aliases of a registered model with their version numbers; empty where the model does not exist."""
    from mlflow.exceptions import MlflowException

    try:
        return {alias: int(number) for alias, number in store.client.get_registered_model(name).aliases.items()}
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return {}
        raise EnvironmentProblem(
            f"{name}: the registry does not answer ({first_line(error)}). Fix: see rlhf doctor"
        ) from error


def versions_of(store: Store, name: str) -> list[ModelVersion]:
    """Every version of one registered model, the oldest first."""
    by_number: dict[int, list[str]] = {}
    for alias, number in aliases_of(store, name).items():
        by_number.setdefault(number, []).append(alias)
    found, token = [], None
    while True:
        page = store.client.search_model_versions(f"name = '{name}'", max_results=1000, page_token=token)
        found += [_plain(version, by_number) for version in page]
        token = page.token
        if not token:
            return sorted(found, key=lambda version: version.version)


def find_version(store: Store, name: str, content: str) -> ModelVersion | None:
    """The version with this outputs hash, or None."""
    return next((version for version in versions_of(store, name) if version.outputs_hash == content), None)


def register_version(
    store: Store,
    run_id: str,
    *,
    name: str,
    stage: str,
    folder: Path,
    content: str,
    manifest: Mapping[str, Any],
    tags: Mapping[str, str],
    metrics: Metrics,
    example: Mapping[str, str],
    time_ms: int,
) -> ModelVersion:
    """Register a model folder unless a version with the same content is there; either way return the version.

    Args:
        run_id: MLflow run of the stage.
        content: the outputs hash that `folder` must still have.
        manifest: lineage, kept within the logged model.
        example: `prompt` and, for a reward model, `response`.
        time_ms: when this was asked for; figures carry it, so that asking again adds nothing.

    Raises:
        ContentChanged: `folder` has other content by now.
    """
    with lock(store.home, "registry"):
        existing = find_version(store, name, content)
        if existing is not None:
            if existing.run_id == run_id:  # the same request again: its last step may be what was missing
                _show_metrics(store, existing, metrics, time_ms)
            return existing
        if outputs_hash(stage, folder) != content:
            raise ContentChanged(f"{folder}: the model changed before it was registered as {name}")
        _ensure_model(store, name)
        model_id = logged_model.log(
            store, run_id, name=name, folder=folder, content=content, manifest=manifest, example=example
        )
        own = {STAGE: stage, OUTPUTS_HASH: content, METRICS: json.dumps(_finite(metrics), sort_keys=True)}
        with as_default(store):
            made = store.client.create_model_version(
                name, source=f"models:/{model_id}", run_id=run_id, tags={**tags, **own}, model_id=model_id
            )
        version = _plain(made, {})
        _show_metrics(store, version, metrics, time_ms)
        return version


def attach_metrics(store: Store, version: ModelVersion, metrics: Metrics, time_ms: int) -> None:
    """Add headline figures to a version; a figure that is there already is replaced. NaN counts as undefined."""
    with lock(store.home, "registry"):
        current = store.client.get_model_version(version.name, str(version.version))
        merged = {**json.loads(current.tags.get(METRICS, "{}")), **_finite(metrics)}
        store.client.set_model_version_tag(
            version.name, str(version.version), METRICS, json.dumps(merged, sort_keys=True)
        )
        _show_metrics(store, version, metrics, time_ms)


def set_candidate(store: Store, version: ModelVersion, time_ms: int) -> None:
    """Point `candidate` at a version, unless something newer than `time_ms` was proposed in the meantime.

    A proposal that was made while the store was away arrives late and must not undo a later one.
    """
    with lock(store.home, "registry"):
        standing = store.client.get_registered_model(version.name)
        if CANDIDATE in standing.aliases and int(standing.tags.get(CANDIDATE_TIME, 0)) > time_ms:
            return
        store.client.set_registered_model_alias(version.name, CANDIDATE, str(version.version))
        store.client.set_registered_model_tag(version.name, CANDIDATE_TIME, str(time_ms))


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
    """Copy a file that was attached to a version below `destination`; None where there is none."""
    folder, _, _ = path.rpartition("/")
    listed = {item.path for item in store.client.list_artifacts(version.run_id, folder)}
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


def descriptions() -> dict[str, str]:
    """Registered models with their descriptions, from `mlflow/registry.yaml`."""
    return dict(YAML(typ="safe").load(REGISTRY_FILE.read_text())["models"])


def _ensure_model(store: Store, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        store.client.create_registered_model(name, description=descriptions()[name])
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _show_metrics(store: Store, version: ModelVersion, metrics: Metrics, time_ms: int) -> None:
    made = store.client.get_model_version(version.name, str(version.version))
    logged_model.log_metrics(store, version.run_id, logged_model.model_id(made), _finite(metrics), time_ms)


def _finite(metrics: Metrics) -> dict[str, float | None]:
    """Figures as numbers, undefined ones as None: JSON has no NaN, and no gate may meet one."""
    plain = {key: None if value is None else float(value) for key, value in metrics.items()}
    return {key: value if value is not None and math.isfinite(value) else None for key, value in plain.items()}


def _plain(version: "MlflowVersion", aliases: Mapping[int, Sequence[str]]) -> ModelVersion:
    return ModelVersion(
        name=version.name,
        version=int(version.version),
        stage=version.tags.get(STAGE, ""),
        outputs_hash=version.tags.get(OUTPUTS_HASH, ""),
        aliases=tuple(sorted(aliases.get(int(version.version), ()))),
        metrics=json.loads(version.tags.get(METRICS, "{}")),
        tags={key: value for key, value in version.tags.items() if key != METRICS},
        run_id=version.run_id or "",
        created=version.creation_timestamp / 1000,
    )
