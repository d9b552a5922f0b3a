"""What is asked of the registry when a stage has made a model: everything that a version will carry."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_core.errors import ConfigError
from tasks.catalogue import models_name
from tasks.lineage.manifest import build_manifest, lineage_tags
from tasks.lineage.model_folders import data_notes, folder_notes
from tasks.tracking.events import Registration
from tasks.tracking.flat import dotted, numbers
from tasks.tracking.names import SCORING_MODEL
from tasks.tracking.registration import outputs_hash

EXAMPLE = {"prompt": "Please write one sentence that thanks a colleague.", "response": "Thank you for your help today."}
VERSION_TAGS = ("run", "profile", "prefect_flow_run_id")  # of the run's tags, those that its versions have too


def registration_request(
    root: Path,
    stage: str,
    folder: Path,
    *,
    tags: Mapping[str, str],
    params: Mapping[str, Any],
    metrics: Mapping[str, float | None],
    example: Mapping[str, str],
) -> Registration:
    """What `registration.register_version` is to make, as it is known when a stage is done.

    Args:
        tags: of the run.
        example: input example; what it lacks is made up.

    Raises:
        ConfigError: the stage makes no model.
        EnvironmentProblem: no git checkout, or `dvc.lock` does not know the stage.
    """
    name = registered_name(stage)
    manifest = build_manifest(root, stage)
    manifest["model_folders"] = folder_notes(root, manifest["params"])
    manifest["data_files"] = data_notes(root, manifest["params"])
    shown = {column: example.get(column, made_up) for column, made_up in EXAMPLE.items()}
    return Registration(
        name=name,
        stage=stage,
        content=outputs_hash(stage, folder),
        manifest=manifest,
        tags={key: tags[key] for key in VERSION_TAGS if tags.get(key)} | lineage_tags(manifest),
        params=dict(dotted(params)),
        metrics=numbers(metrics),
        example=shown if name == SCORING_MODEL else {"prompt": shown["prompt"]},
    )


def registered_name(stage: str) -> str:
    """Registered model that a stage's output belongs to.

    Raises:
        ConfigError: the stage makes no model.
    """
    name = models_name(stage)
    if name is None:
        raise ConfigError(f"stage {stage}: makes no model. Fix: register sft, reward or align@<algorithm>")
    return name
