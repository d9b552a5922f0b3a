"""What a run tells the tracking record: who ran what on which data, each stage's settings and figures, the verdict."""

import getpass
import json
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from flows.run.request import PreparedRun
from flows.run.summary import RunSummary, StageSummary
from tasks import paths
from tasks.catalogue import models_name, stage_row
from tasks.frame.definition import stage_definition, stage_settings
from tasks.lineage.manifest import commit_of, stage_inputs
from tasks.paths import LOCK
from tasks.stages.report.headline import run_figures

if TYPE_CHECKING:
    from tasks.tracking import DataSet, Judging, Status

ENDED = ("finished_share", "finished_share_low", "finished_share_high")


class RunRecord:
    """The parent run, and what is said about each stage on its child run.

    Args:
        prepared: what runs where.
        summary: of the run; stages get their outputs hash here.
        tags: what the control plane knows: flow run, what started it.
    """

    def __init__(self, prepared: PreparedRun, summary: RunSummary, tags: Mapping[str, str]) -> None:
        from tasks.tracking import Recorder, SystemWatch  # here: an unchanged run has nothing to tell

        self.prepared, self.root, self.summary = prepared, prepared.root, summary
        self.recorder = Recorder(
            self.root,
            summary.run_key,
            name=prepared.name,
            tags=self._tags(tags),
            params=prepared.params.model_dump(mode="json", by_alias=True),
        )
        self.recorder.inputs(None, self._data("validate", "training"))
        every = prepared.params.machine.system_metrics_every
        self._watch = SystemWatch(self.recorder, every) if every else None

    def start(self, stage: str) -> None:
        """Begin a stage's child run, with the settings that the stage depends on."""
        self.recorder.start_stage(stage, params=self._params(stage))
        if self._watch:
            self._watch.begin(stage)

    def finish(self, stage: StageSummary) -> None:
        """Record a stage that is done: files, data, model, figures; the headline figures on the parent run too."""
        name, figures = stage.name, numbers(stage.metrics)
        for extra in (paths.metrics_file(name), paths.plots_file(name), paths.stage_output(name) / "samples.json"):
            if (self.root / extra).is_file():
                self.recorder.artifact(name, extra)
        self.recorder.inputs(name, self._data(name, "training" if makes_model(name) else "evaluation"))
        if makes_model(name):
            stage.outputs_hash = self.recorder.register(
                name, paths.stage_output(name) / "model", figures, params=self._params(name)
            )
        headline = run_figures(name, stage.metrics)
        if name == "evaluate":
            self._evaluation(stage.metrics)
            figures |= headline
        self.recorder.figures(None, headline)
        self._unwatch(name)
        self.recorder.finish_stage(name, "FINISHED", figures)

    def passed_over(self, stage: StageSummary) -> None:
        """A stage that an earlier run has recorded: its figures are among this run's headline figures all the same."""
        self.recorder.figures(None, run_figures(stage.name, stage.metrics))

    def fail(self, stage: StageSummary, *, interrupted: bool) -> None:
        """End a stage's run that did not come to its end, and say why."""
        why = f"{stage.name}: {stage.message}" if stage.message else f"{stage.name}: exit code {stage.exit_code}"
        self._unwatch(stage.name)
        self.recorder.finish_stage(stage.name, "KILLED" if interrupted else "FAILED", why=why)

    def close(self, status: "Status", patience_s: float, why: str) -> str:
        """End the run and send what waits; returns what could not be recorded, in words, empty where all was."""
        if self._watch:
            self._watch.stop()
        return str(self.recorder.close(status, patience_s=patience_s, why=why))

    def _unwatch(self, stage: str) -> None:
        if self._watch:
            self._watch.end(stage)

    def _evaluation(self, metrics: Mapping[str, Any]) -> None:
        """Give every model its figures and answers; then all of this lineage become candidates, at once."""
        verdict = metrics.get("verdict") or {}
        judging = _judging(verdict)
        best: dict[str, str] = {}
        for stage in self.summary.stages:
            row = stage_row(stage.name)
            if stage.outputs_hash is None or row is None or not row.role:
                continue
            of = stage.name.partition("@")[2] or row.name
            if row.role != "policy" or of == verdict.get("best"):
                best[stage.name] = stage.outputs_hash
            figures = _evaluated(metrics.get(of), verdict.get("temperature")) if row.role != "judge" else {}
            if figures:
                compared = judging if row.role == "policy" else None
                self.recorder.attach(stage.name, stage.outputs_hash, figures, verdict=compared)
                answers = paths.EVALUATE / "responses.parquet"
                self.recorder.attach_responses(stage.name, stage.outputs_hash, answers, rows_of=of)
        if verdict.get("best"):
            self.recorder.set_candidates(best)

    def _params(self, stage: str) -> dict[str, Any]:
        return stage_settings(stage_definition(self.root, stage), self.prepared.params)

    def _data(self, stage: str, context: str) -> Iterator["DataSet"]:
        """Data that a stage read, by DVC's hashes: no code."""
        from tasks.tracking import DataSet

        for path, digest in stage_inputs(self.root / LOCK, stage).items():
            if path.startswith(("data", "artifacts", "models")):
                source = json.dumps({"uri": str(self.root / path)})
                yield DataSet(name=path, digest=digest, source=source, context=context)

    def _tags(self, tags: Mapping[str, str]) -> dict[str, str]:
        request = self.prepared.request
        commit, branch = commit_of(self.root)
        own = {
            "run": self.prepared.name,
            "profile": request.profile or "",
            "kind": "in place" if self.root == self.prepared.home else "worktree",
            "overrides": ", ".join(request.overrides),
            "data": ", ".join(f"{kind}={path}" for kind, path in sorted(request.data.items())),
            "mlflow.user": _user(),
            "mlflow.source.type": "LOCAL",
            "mlflow.source.name": "rlhf",
            "mlflow.source.git.commit": commit,
            "mlflow.source.git.branch": branch,
        }
        return {key: value for key, value in {**own, **tags}.items() if value}


def makes_model(stage: str) -> bool:
    """Whether a stage's output is a registered model."""
    return models_name(stage) is not None


def numbers(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """The figures among a stage's metrics that are numbers, or undefined (None), at the top level."""
    return {
        key: value
        for key, value in metrics.items()
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    }


def _evaluated(figures: Mapping[str, Any] | None, temperature: float | None) -> dict[str, float | None]:
    """A model's figures in `evaluate.json`, with the share of replies it ended at the temperature that decides."""
    if not figures:
        return {}
    lengths = figures.get("lengths", {}).get(f"T={temperature:g}" if temperature is not None else "", {})
    ended = {name: lengths[name] for name in ENDED if name in lengths}
    return numbers(figures) | ended


def _judging(verdict: Mapping[str, Any]) -> "Judging | None":
    """How the policies were compared; None where the evaluation does not say."""
    from tasks.tracking import Judging

    found = {key: verdict.get(key) for key in Judging.model_fields}
    return None if None in found.values() else Judging.model_validate(found)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
