"""The registry's versions read straight from MLflow's SQLite file: importing MLflow alone takes two seconds.

Read-only, and only in the database schema that is known here; of any other store or schema the caller asks MLflow.
"""

import sqlite3
from collections import defaultdict
from contextlib import closing
from pathlib import Path

from tasks.catalogue import MODEL_NAMES
from tasks.tracking.names import OUTPUTS_HASH, STAGE, UNDEFINED, ModelVersion

KNOWN_SCHEMA = "dc11669786a5"  # of MLflow 3.17; its table alembic_version
SQLITE = "sqlite:///"
DELETED = "Deleted_Internal"  # what MLflow writes into the stage of a version that was deleted

VERSIONS = """
    SELECT name, version, source, run_id, creation_time FROM model_versions
    WHERE current_stage IS NOT ? AND workspace = 'default'
"""
FIGURES = """
    SELECT figures.model_id, metric_name, metric_value FROM logged_model_metrics AS figures
    JOIN logged_models AS models ON models.model_id = figures.model_id WHERE lifecycle_stage = 'active'
    ORDER BY metric_timestamp_ms
"""


def versions_in_file(uri: str) -> list[ModelVersion] | None:
    """Every version, by model and number; None where the store is none that this module can read.

    Args:
        uri: address of the store.
    """
    path = Path(uri.removeprefix(SQLITE))
    if not uri.startswith(SQLITE) or "?" in uri or not path.is_file():
        return None
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=5.0)) as base:
            if base.execute("SELECT version_num FROM alembic_version").fetchall() != [(KNOWN_SCHEMA,)]:
                return None
            return _read(base)
    except sqlite3.Error:  # locked, cut off, another schema: MLflow's own client has the words for it
        return None


def _read(base: sqlite3.Connection) -> list[ModelVersion]:
    tags: dict[tuple[str, int], dict[str, str]] = defaultdict(dict)
    for name, version, key, value in base.execute("SELECT name, version, key, value FROM model_version_tags"):
        tags[name, version][key] = value
    aliases: dict[tuple[str, int], list[str]] = defaultdict(list)
    for name, version, alias in base.execute("SELECT name, version, alias FROM registered_model_aliases"):
        aliases[name, version].append(alias)
    figures: dict[str, dict[str, float | None]] = defaultdict(dict)
    for model, key, value in base.execute(FIGURES):
        figures[model][key] = value
    found = []
    for name, version, source, run_id, created in base.execute(VERSIONS, (DELETED,)):
        own = dict(tags[name, version])
        undefined = [key for key in own.pop(UNDEFINED, "").split(", ") if key]
        model = str(source).removeprefix("models:/").partition("/")[0]
        found.append(
            ModelVersion(
                name=name,
                version=version,
                stage=own.get(STAGE, ""),
                outputs_hash=own.get(OUTPUTS_HASH, ""),
                aliases=tuple(sorted(aliases[name, version])),
                metrics={**figures[model], **dict.fromkeys(undefined)},
                tags=own,
                run_id=run_id or "",
                created=created / 1000,
            )
        )
    ours = [version for version in found if version.name in MODEL_NAMES]
    return sorted(ours, key=lambda version: (MODEL_NAMES.index(version.name), version.version))
