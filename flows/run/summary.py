"""What a run did, stage by stage: the schema of `reports/summary.json` and of the live note `.rlhf/run.json`.

The live note is rewritten at every change, so `rlhf status` and `rlhf resume` need no server and nothing is lost when
the run is killed. Both files are the control plane's: they hold times and are no input of anything reproducible.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlhf_core.state.atomic import write_json
from tasks import paths

LIVE_FILE = paths.STATE / "run.json"

StageStatus = Literal["waiting", "running", "done", "unchanged", "failed", "interrupted", "left out"]
RunStatus = Literal["running", "done", "failed", "interrupted"]


class StageSummary(BaseModel):
    """One stage of a run."""

    model_config = ConfigDict(extra="forbid")

    name: str
    status: StageStatus = "waiting"
    wall_s: float | None = Field(default=None, description="seconds from its turn until it was done and recorded")
    computed_from: float | None = Field(default=None, description="when its own work began, seconds since 1970")
    compute_s: float | None = Field(default=None, description="seconds of the stage's own work; null if it did not run")
    overhead_s: float | None = Field(default=None, description="wall_s less compute_s: DVC, Prefect, records, start")
    peak_memory_mb: float | None = Field(default=None, description="largest resident size of its process")
    tokens: int | None = Field(default=None, description="tokens it worked through")
    tokens_per_s: float | None = Field(default=None, description="tokens over compute_s")
    metrics: dict[str, Any] = Field(default_factory=dict, description="reports/metrics/<stage>.json")
    outputs_hash: str | None = Field(default=None, description="identity of the model that the stage made")
    model_version: str | None = Field(
        default=None, description="registered version, name/number; null if not yet known"
    )
    exit_code: int | None = Field(default=None, description="of its process; null when none was started")
    recorded: bool = Field(default=False, description="handed to the tracking record (sent, or kept to be sent later)")
    message: str = Field(default="", description="what went wrong, in one line")


class Verdict(BaseModel):
    """A/B of the best algorithm against the SFT model, by the first judge at the first temperature."""

    model_config = ConfigDict(extra="forbid")

    best: str
    judge: str
    simulated: bool = Field(description="the judge is part of the demo world and no person")
    temperature: float
    win_rate: float
    win_rate_low: float
    win_rate_high: float
    p_value: float
    confidence: float
    kl_to_sft: float | None = None
    better_than_sft: bool = Field(description="the whole interval is above one half, and the test agrees")


class RunSummary(BaseModel):
    """A whole run."""

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    run: str
    run_key: str = Field(description="identity of the run in the tracking record; a resumed run keeps it")
    status: RunStatus = "running"
    exit_code: int | None = None
    started: float = Field(description="seconds since 1970")
    finished: float | None = None
    wall_s: float | None = None
    compute_s: float | None = Field(default=None, description="sum over the stages that ran, side by side or not")
    busy_s: float | None = Field(default=None, description="seconds in which at least one stage computed")
    overhead_s: float | None = Field(default=None, description="wall_s less busy_s")
    overhead_per_stage_s: float | None = Field(default=None, description="mean overhead_s of the stages that ran")
    stages: list[StageSummary]
    model_versions: dict[str, str] = Field(default_factory=dict, description="stage to name/number")
    verdict: Verdict | None = None
    flow_run_url: str | None = None
    tracking: str = Field(default="", description="what the tracking record says about what it could not send yet")
    message: str = Field(default="", description="what went wrong, in one line")

    def stage(self, name: str) -> StageSummary:
        """The summary of one stage.

        Raises:
            KeyError: the run has no such stage.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)

    def close(self, status: RunStatus, exit_code: int, now: float) -> None:
        """Fill in the totals at the end of a run."""
        self.status, self.exit_code, self.finished = status, exit_code, now
        self.wall_s = now - self.started
        ran = [stage for stage in self.stages if stage.compute_s is not None]
        self.compute_s = sum(stage.compute_s or 0.0 for stage in ran)
        self.busy_s = covered([(stage.computed_from or 0.0, stage.compute_s or 0.0) for stage in ran])
        self.overhead_s = self.wall_s - self.busy_s
        self.overhead_per_stage_s = sum(stage.overhead_s or 0.0 for stage in ran) / len(ran) if ran else None


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds that spans (start, length) cover together; what several cover counts once."""
    total, end = 0.0, float("-inf")
    for start, length in sorted(spans):
        total += max(0.0, start + length - max(start, end))
        end = max(end, start + length)
    return total


def verdict_of(metrics: dict[str, Any]) -> Verdict | None:
    """The verdict in the metrics of `evaluate`, or None where there is none or a figure of it is undefined."""
    found = metrics.get("verdict")
    if not isinstance(found, dict):
        return None
    known = {name: found[name] for name in Verdict.model_fields if name in found}
    try:
        verdict = Verdict.model_validate(known | {"better_than_sft": False})
    except ValidationError:
        return None
    shown = verdict.win_rate_low > 0.5 and verdict.p_value < 1.0 - verdict.confidence
    return verdict.model_copy(update={"better_than_sft": shown})


def write_live(root: Path, summary: RunSummary) -> None:
    """Write the live note."""
    write_json(root / LIVE_FILE, summary.model_dump(mode="json"))


def write_summary(root: Path, summary: RunSummary) -> None:
    """Write the live note and `reports/summary.json`."""
    write_live(root, summary)
    write_json(root / paths.SUMMARY, summary.model_dump(mode="json"))


def read_summary(path: Path) -> RunSummary | None:
    """Read either file; None where it is missing or of another schema version."""
    try:
        return RunSummary.model_validate(json.loads(path.read_text()))
    except (OSError, ValueError, ValidationError):
        return None


def read_metrics(root: Path, stage: str) -> dict[str, Any]:
    """Headline figures of a stage, empty where it wrote none."""
    try:
        return dict(json.loads((root / paths.metrics_file(stage)).read_text()))
    except (OSError, ValueError):
        return {}
