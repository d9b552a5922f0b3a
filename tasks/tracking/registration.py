"""Putting model versions into the registry: once by content, with figures, a description, and the candidates."""

from collections.abc import Sequence
from pathlib import Path

from ruamel.yaml import YAML

from rlhf_core.faults import faultpoint
from rlhf_core.state.atomic import digest_of, tree_digest
from tasks.tracking import logged_model
from tasks.tracking.describe import described
from tasks.tracking.events import Judging, Registration
from tasks.tracking.fitting import LONGEST_VERSION_TAG, fitted
from tasks.tracking.names import CANDIDATE, CANDIDATE_TIME, OUTPUTS_HASH, STAGE, UNDEFINED, ModelVersion
from tasks.tracking.registry import Metrics, find_version, finite, plain_version
from tasks.tracking.store import Store, as_default, lock

REGISTRY_FILE = Path(__file__).parents[2] / "mlflow" / "registry.yaml"


class ContentChanged(Exception):
    """A model folder is no longer what was to be registered."""


def outputs_hash(stage: str, folder: Path) -> str:
    """Identity of a model: digest of its stage and of every file of its folder."""
    return digest_of({"stage": stage, "files": tree_digest(folder)})


def register_version(store: Store, run_id: str, request: Registration, folder: Path, time_ms: int) -> ModelVersion:
    """Register a model folder unless a version with the same content is there; either way return the version.

    Args:
        run_id: MLflow run of the stage.
        time_ms: when this was asked for; figures carry it, so that asking again adds nothing.

    Raises:
        ContentChanged: `folder` has other content by now.
    """
    with lock(store.home, "registry"):
        existing = find_version(store, request.name, request.content)
        if existing is not None:
            if existing.run_id == run_id:  # the same request again: its last step may be what was missing
                _show(store, existing, request.metrics, time_ms, None)
            return existing
        if outputs_hash(request.stage, folder) != request.content:
            raise ContentChanged(f"{folder}: the model changed before it was registered as {request.name}")
        _ensure_model(store, request.name)
        model_id = logged_model.log(store, run_id, request, folder)
        own = {**request.tags, STAGE: request.stage, OUTPUTS_HASH: request.content}
        with as_default(store):
            made = store.client.create_model_version(
                request.name,
                source=f"models:/{model_id}",
                run_id=run_id,
                tags={key: fitted(value, LONGEST_VERSION_TAG) for key, value in own.items()},
                model_id=model_id,
            )
        version = plain_version(made, {}, {})
        _show(store, version, request.metrics, time_ms, None)
        return version


def attach_metrics(
    store: Store, version: ModelVersion, metrics: Metrics, time_ms: int, verdict: Judging | None = None
) -> None:
    """Add headline figures to a version; a figure that is there already is replaced. NaN counts as undefined.

    Args:
        verdict: how they were measured, for the description.
    """
    with lock(store.home, "registry"):
        _show(store, version, metrics, time_ms, verdict)


def set_candidates(store: Store, versions: Sequence[ModelVersion], time_ms: int) -> None:
    """Point `candidate` at versions of one lineage, all or none, unless newer ones than `time_ms` were proposed.

    A proposal that was made while the store was away arrives late and must not undo a later one.
    """
    with lock(store.home, "registry"):
        standing = [store.client.get_registered_model(version.name) for version in versions]
        if any(CANDIDATE in model.aliases and int(model.tags.get(CANDIDATE_TIME, 0)) > time_ms for model in standing):
            return
        for version in versions:  # a kill in between leaves the event unsent: the next sender moves them all again
            store.client.set_registered_model_alias(version.name, CANDIDATE, str(version.version))
            store.client.set_registered_model_tag(version.name, CANDIDATE_TIME, str(time_ms))
            faultpoint("candidates.between")


def registry_texts() -> dict[str, str]:
    """Registered models with their descriptions, from `mlflow/registry.yaml`."""
    return dict(YAML(typ="safe").load(REGISTRY_FILE.read_text())["models"])


def _ensure_model(store: Store, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        store.client.create_registered_model(name, description=registry_texts()[name])
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _show(store: Store, version: ModelVersion, metrics: Metrics, time_ms: int, verdict: Judging | None) -> None:
    """Figures on the logged model and its run, the names of undefined ones as a tag, and the description renewed."""
    number = str(version.version)
    made = store.client.get_model_version(version.name, number)
    model_id = logged_model.model_id(made)
    figures = finite(metrics)
    logged_model.log_metrics(store, version.run_id, model_id, figures, time_ms)
    logged_model.link_version(store, model_id, version.name, version.version)
    before = set(made.tags.get(UNDEFINED, "").split(", ")) - {""}
    undefined = sorted((before - figures.keys()) | {name for name, value in figures.items() if value is None})
    if undefined != sorted(before):
        store.client.set_model_version_tag(version.name, number, UNDEFINED, ", ".join(undefined))
    shown = logged_model.figures_of(store, [model_id]).get(model_id, {}) | dict.fromkeys(undefined)
    text = described(version, shown, verdict, made.description or "")
    if text != (made.description or ""):
        store.client.update_model_version(version.name, number, description=text)
