"""What a stage leaves in the Prefect UI: figures, samples before and after, where to look further."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from prefect.artifacts import create_markdown_artifact, create_table_artifact

from flows.execution import PipelineRun
from flows.headlines import number, seconds
from flows.servers import known_servers
from flows.summary import RunSummary, StageSummary
from tasks import paths

SAMPLE_ROWS = 20
SAMPLE_CHARS = 600


def publish_stage(run: PipelineRun, stage: StageSummary) -> None:
    """Make the stage's artifacts; called within its task."""
    key = paths.slug(stage.name)
    rows = [{"figure": name, "value": number(value)} for name, value in flat_numbers(stage.metrics)]
    if rows:
        create_table_artifact(rows, key=f"{key}-metrics", description=f"Figures of {stage.name}")
    create_markdown_artifact(_stage_page(run, stage), key=f"{key}-stage", description=f"How {stage.name} went")
    samples = _samples(run, stage)
    if samples:
        create_table_artifact(samples, key=f"{key}-samples", description=f"Samples of {stage.name}")


def publish_summary(summary: RunSummary) -> None:
    """Make the run's summary artifact; called within the flow."""
    create_markdown_artifact(summary_page(summary), key="run-summary", description="Every stage and the verdict")


def flat_numbers(metrics: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    """Every number in a nested mapping with its dotted key."""
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            yield from flat_numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", value


def summary_page(summary: RunSummary) -> str:
    """The summary as Markdown."""
    lines = [f"# Run `{summary.run}`: {summary.status}", ""]
    verdict = summary.verdict
    if verdict:
        judge = f"{verdict.judge} (simulated)" if verdict.simulated else verdict.judge
        lines += [
            f"**{verdict.best}** against SFT by {judge} at temperature {verdict.temperature:g}: win rate "
            f"**{verdict.win_rate:.3f}** [{verdict.win_rate_low:.3f}, {verdict.win_rate_high:.3f}], "
            f"p = {verdict.p_value:.2g}",
            "",
        ]
    lines += ["| stage | status | compute | overhead | model |", "|---|---|---|---|---|"]
    lines += [
        f"| {stage.name} | {stage.status} | {seconds(stage.compute_s)} | {seconds(stage.overhead_s)} | "
        f"{stage.model_version or ''} |"
        for stage in summary.stages
    ]
    return "\n".join(lines)


def _stage_page(run: PipelineRun, stage: StageSummary) -> str:
    lines = [f"# {stage.name}: {stage.status}", "", "| | |", "|---|---|", f"| folder | `{run.root.name}` |"]
    lines += [f"| compute | {seconds(stage.compute_s)} |"] if stage.compute_s is not None else []
    lines += [f"| peak memory | {stage.peak_memory_mb:,.0f} MB |"] if stage.peak_memory_mb is not None else []
    lines += [f"| tokens a second | {stage.tokens_per_s:,.0f} |"] if stage.tokens_per_s is not None else []
    lines += [f"| outputs | `{paths.stage_output(stage.name)}` |"]
    lines += [f"| model | `{stage.outputs_hash[:16]}` |"] if stage.outputs_hash else []
    link = mlflow_link(run, stage.name)
    lines += [f"| MLflow | {link} |"] if link else []
    return "\n".join(lines)


def mlflow_link(run: PipelineRun, stage: str) -> str:
    """Where the stage's MLflow run is: a link where the MLflow server runs, else the run's id; empty when unknown."""
    recorder = run.recorder
    run_id = recorder.run_id(stage) if recorder else None
    if recorder is None or run_id is None:
        return ""
    server = known_servers(run.prepared.home).get("mlflow")
    return f"[{run_id}]({server.url}/#/runs/{run_id})" if server else f"`{run_id}` (rlhf ui opens the server)"


def _samples(run: PipelineRun, stage: StageSummary) -> list[dict[str, str]]:
    path = run.root / paths.stage_output(stage.name) / "samples.json"
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    rows = found if isinstance(found, list) else next((part for part in found.values() if isinstance(part, list)), [])
    return [_cells(row) for row in rows[:SAMPLE_ROWS] if isinstance(row, Mapping)]


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    """A flat row of short texts: nested parts get dotted names."""
    cells: dict[str, str] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            cells |= {f"{key}.{inner}": text for inner, text in _cells(value).items()}
        else:
            text = f"{value:.3g}" if isinstance(value, float) else str(value)
            cells[str(key)] = text if len(text) <= SAMPLE_CHARS else text[: SAMPLE_CHARS - 1] + "…"
    return cells
