"""What the report reads of a run; a file that a run does not have is `None` or empty, never an error."""

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tasks import paths
from tasks.catalogue import CATALOGUE, policy_stage, stage_row


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFiles:
    """Everything of a run that the page shows.

    Attributes:
        metrics: headline figures by stage name (`align@ppo`), in the order of the pipeline.
        curves: rows of each stage that trains, by stage name; a missing cell is left out of its row.
        heldout_scores, graded_scores: columns of the reward model's tables.
    """

    metrics: dict[str, dict[str, Any]]
    curves: dict[str, list[dict[str, float]]]
    annotators: Any
    funnel: Any
    calibration: Any
    heldout_scores: dict[str, list[Any]]
    graded_scores: dict[str, list[Any]]
    samples: list[dict[str, Any]]


def read_run(root: Path, candidates: tuple[str, ...]) -> RunFiles:
    """Read the small files of the run at `root`; `candidates` are its aligned and combined policies."""
    stages = stages_of(candidates)
    metrics = {stage: _json(root / paths.metrics_file(stage)) for stage in stages}
    curves = {stage: _curves(root / paths.plots_file(stage)) for stage in stages}
    return RunFiles(
        metrics={stage: figures for stage, figures in metrics.items() if figures},
        curves={stage: rows for stage, rows in curves.items() if rows},
        annotators=_json(root / paths.LABEL / "annotators.json"),
        funnel=_json(root / paths.PREFERENCES / "funnel.json"),
        calibration=_json(root / paths.REWARD / "calibration.json"),
        heldout_scores=_columns(root / paths.REWARD / "heldout_scores.parquet"),
        graded_scores=_columns(root / paths.REWARD / "graded_scores.parquet", ("score", "model_score")),
        samples=_json(root / paths.EVALUATE / "samples.json") or [],
    )


def stages_of(candidates: Iterable[str]) -> list[str]:
    """The stages of a run before its report, in their order, with one of each of its policies."""
    made = [policy_stage(name) for name in candidates]
    names = []
    for row in CATALOGUE:
        names += [name for name in made if stage_row(name) == row] if row.items else [row.name]
    return [name for name in names if name != "report"]


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _curves(path: Path) -> list[dict[str, float]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [{key: float(cell) for key, cell in row.items() if cell} for row in csv.DictReader(file)]


def _columns(path: Path, names: tuple[str, ...] | None = None) -> dict[str, list[Any]]:
    if not path.is_file():
        return {}
    columns: Mapping[str, list[Any]] = pq.read_table(path, columns=list(names) if names else None).to_pydict()
    return dict(columns) if any(columns.values()) else {}
