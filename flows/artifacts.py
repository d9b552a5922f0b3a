"""What a stage leaves in the Prefect UI: figures, samples before and after, where to look further."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from prefect.artifacts import create_markdown_artifact, create_table_artifact

from flows.local.ports import LOOPBACK, usual_ports
from flows.local.servers import known_servers
from flows.run.execution import PipelineRun
from flows.run.headlines import number, seconds
from flows.run.page import page_of_run
from flows.run.summary import RunSummary, StageSummary
from tasks import paths
from tasks.stages.text_lines import texts_line
from tasks.tracking import tracking_uri

SAMPLE_ROWS = 20
SAMPLE_CHARS = 600
MARKS = re.compile(r"[\\`*_\[\]<>|#~$&]")
READ_FIRST = ("prompt", "reference", "before", "after")  # the columns of a table of samples stand in its rows' order


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


def publish_summary(run: PipelineRun) -> None:
    """Make the run's summary artifact; called within the flow."""
    page = "\n".join([summary_page(run.summary), "", *_links(run)])
    create_markdown_artifact(page, key="run-summary", description="Every stage and the verdict")


def flat_numbers(metrics: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    """Every number in a nested mapping with its dotted key."""
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            yield from flat_numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", value


def summary_page(summary: RunSummary) -> str:
    """The summary as Markdown: as the terminal shows it, with what was cut and what was not recorded."""
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
    lines += [f"{_plain(summary.message)}\n"] if summary.message else []
    lines += ["| stage | status | compute | overhead | model |", "|---|---|---|---|---|"]
    lines += [
        f"| {stage.name} | {stage.status} | {seconds(stage.compute_s)} | {seconds(stage.overhead_s)} | "
        f"{stage.model_version or ''} |"
        for stage in summary.stages
    ]
    lost = {stage.name: texts_line(stage.metrics) for stage in summary.stages}
    lines += [f"\n**Warning**, {name}: {_plain(line)}" for name, line in lost.items() if line]
    lines += [f"\n**Not recorded in MLflow**: {_plain(summary.tracking)}"] if summary.tracking else []
    return "\n".join(lines)


def _plain(text: str) -> str:
    """A text of somebody else's as Markdown shows it: every letter of it, and none of them a mark."""
    return MARKS.sub(r"\\\g<0>", " ".join(text.split()))


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


def mlflow_link(run: PipelineRun, stage: str | None, artifact: str = "", text: str = "") -> str:
    """A link to a stage's MLflow run, to the parent's (None), or to an artifact of it; empty when it is not known.

    It leads to where MLflow's server listens, or will when it is started again, since its port stays the same.
    """
    if run.recorder is None:
        return ""
    home = run.prepared.home
    uri = tracking_uri(home)
    server = uri if uri.startswith("http") else f"http://{LOOPBACK}:{usual_ports(home)['mlflow']}"
    running = uri.startswith("http") or "mlflow" in known_servers(home)
    page = run.recorder.page(server, stage, artifact)
    hint = "" if running else " (`rlhf ui` starts its server)"
    return f"[{text or run.recorder.run_id(stage)}]({page}){hint}" if page else ""


def _links(run: PipelineRun) -> list[str]:
    """Where the run's figures and its report are."""
    links = [("MLflow", mlflow_link(run, None, text=run.prepared.name))]
    report = page_of_run(run.root)
    if report:
        page = mlflow_link(run, None, paths.RUN_PAGE.name, "in MLflow")
        links.append(("Report", " · ".join(part for part in (page, f"file `{report}`") if part)))
    links.append(("Folder", f"`{run.root}`"))
    return [f"- {what}: {link}" for what, link in links if link]


def _samples(run: PipelineRun, stage: StageSummary) -> list[dict[str, str]]:
    path = run.root / paths.stage_output(stage.name) / "samples.json"
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    rows = found if isinstance(found, list) else next((part for part in found.values() if isinstance(part, list)), [])
    return [_cells(row) for row in rows[:SAMPLE_ROWS] if isinstance(row, Mapping)]


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    """A flat row of short texts, in the order that it is read in: nested parts get dotted names."""
    cells: dict[str, str] = {}
    ahead = [key for key in READ_FIRST if key in row]
    for key in [*ahead, *(key for key in row if key not in ahead)]:
        value = row[key]
        if isinstance(value, Mapping):
            cells |= {f"{key}.{inner}": text for inner, text in _cells(value).items()}
        else:
            text = f"{value:.3g}" if isinstance(value, float) else str(value)
            cells[str(key)] = text if len(text) <= SAMPLE_CHARS else text[: SAMPLE_CHARS - 1] + "…"
    return cells
