"""What was recorded before, whichever run made it: a run with nothing but unchanged stages then leaves one line.

`.rlhf/recorded/` of the main checkout has a note for each result, named by what DVC knows of it (hashes of all that
went in and came out) and by the store it was recorded in.
"""

import json
from pathlib import Path
from typing import Any

from flows.run.request import PreparedRun
from flows.run.summary import StageSummary
from rlhf_core.state.atomic import digest_of, write_json
from tasks import paths
from tasks.lineage.manifest import locked_stage
from tasks.paths import LOCK

FOLDER = paths.STATE / "recorded"


def noted(prepared: PreparedRun, stage: str) -> StageSummary | None:
    """A stage's result as an earlier run recorded it; None where none did."""
    path = _path(prepared, stage)
    try:
        found: dict[str, Any] = json.loads(path.read_text()) if path else {}
    except (OSError, ValueError):
        return None
    return StageSummary(name=stage, status="unchanged", recorded=True, **found) if found else None


def note(prepared: PreparedRun, stage: StageSummary) -> None:
    """Note that a stage's result is recorded, and as which version."""
    path = _path(prepared, stage.name)
    if path:
        write_json(path, {"outputs_hash": stage.outputs_hash, "model_version": stage.model_version})


def _path(prepared: PreparedRun, stage: str) -> Path | None:
    from tasks.tracking.store import DATABASE, tracking_uri

    entry = locked_stage(prepared.root / LOCK, stage)
    if not entry:
        return None
    uri, database = tracking_uri(prepared.root), prepared.home / DATABASE
    which = database.stat().st_ino if uri.startswith("sqlite:") and database.exists() else 0  # not one that was lost
    return prepared.home / FOLDER / f"{digest_of({'stage': stage, 'entry': entry, 'store': uri, 'file': which})}.json"
