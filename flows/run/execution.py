"""A run, stage by stage: run or skip, record, register, note. Knows the tracking record, but nothing of Prefect."""

import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from flows.run.page import is_current
from flows.run.record import RunRecord, makes_model
from flows.run.recorded import note, noted
from flows.run.request import PreparedRun, pipeline_stages
from flows.run.selection import chosen_stages
from flows.run.summary import (
    LIVE_FILE,
    RunStatus,
    RunSummary,
    StageSummary,
    read_metrics,
    read_summary,
    verdict_of,
    write_live,
    write_summary,
)
from tasks import paths
from tasks.frame.forked import Forks
from tasks.frame.runner import Event, ProgressFollower, StageResult, Stop, run_stage_process

if TYPE_CHECKING:
    from tasks.tracking import Recorder, Status

CURVE_SECONDS = 3.0
CLOSING_PATIENCE_S = 60.0
HURRIED_PATIENCE_S = 0.3


class Observer(Protocol):
    """Someone who watches a run: a live table, plain lines, or nobody."""

    def stage_started(self, stage: str) -> None:
        """A stage's turn has come."""

    def stage_event(self, stage: str, event: Event) -> None:
        """An event of the stage's progress stream."""

    def stage_finished(self, stage: StageSummary) -> None:
        """A stage is up to date and recorded, or failed."""


class Nobody:
    """Watches nothing."""

    def stage_started(self, stage: str) -> None:
        """Nothing."""

    def stage_event(self, stage: str, event: Event) -> None:
        """Nothing."""

    def stage_finished(self, stage: StageSummary) -> None:
        """Nothing."""


class PipelineRun:
    """One run in one checkout; the caller holds its lock. Stages that are independent may run in several threads.

    Args:
        prepared: what to run and where.
        changed: stages that are not up to date; the request may leave some of them out.
        stop: ends the run when requested.
        observer: is told what happens.
        forks: forks the stages' processes; None has them start afresh.
    """

    def __init__(
        self,
        prepared: PreparedRun,
        changed: Iterable[str],
        *,
        stop: Stop,
        observer: Observer | None = None,
        forks: Forks | None = None,
    ) -> None:
        self.prepared, self.root, self.stop = prepared, prepared.root, stop
        self.observer: Observer = observer or Nobody()
        self.forks = forks
        names, request = pipeline_stages(self.root), prepared.request
        self.chosen = chosen_stages(
            self.root, names, first=request.from_stage, last=request.until_stage, changed=set(changed)
        )
        self.changed = set(changed) & self.chosen
        self._before = read_summary(self.root / LIVE_FILE)
        resumed = self._before is not None and self._before.status in ("running", "interrupted")
        key = self._before.run_key if self._before and resumed else f"{prepared.name}-{uuid.uuid4().hex[:8]}"
        self.summary = RunSummary(
            run=prepared.name, run_key=key, started=time.time(), stages=[self._entry(name) for name in names]
        )
        self.record: RunRecord | None = None
        self._noting = threading.Lock()

    def open(self, tags: Mapping[str, str]) -> None:
        """Note that the run goes on, and open the tracking record unless there is nothing to tell it."""
        if tags.get("prefect_flow_run_url"):
            self.summary.flow_run_url = tags["prefect_flow_run_url"]
        self._note()
        new = self._before is None or not all(self._recorded_before(name) for name in self.chosen)
        if self.changed or new:  # a run in a place of its own leaves a line even where nothing was to do
            self.record = RunRecord(self.prepared, self.summary, tags)

    @property
    def recorder(self) -> "Recorder | None":
        """The open tracking record; None where there is nothing to tell it."""
        return self.record.recorder if self.record else None

    def passes_over(self, name: str) -> bool:
        """Whether a stage has nothing to do and nothing to record: an earlier run did all of it."""
        return self._recorded_before(name) is not None

    def run_stage(self, name: str, on_line: Callable[[str], None]) -> StageSummary:
        """Bring one stage up to date and have it recorded; returns its summary, whose status says how it went."""
        started = time.monotonic()
        stage = self.summary.stage(name)
        stage.status = "running"
        self._note()
        self.observer.stage_started(name)
        if name in self.changed:
            self._execute(stage, on_line)
        else:
            stage.status = "unchanged"
        if stage.status in ("done", "unchanged"):
            stage.metrics = read_metrics(self.root, name)
            self._record(stage)
            if stage.name == "evaluate":
                self.summary.verdict = verdict_of(stage.metrics)
        stage.wall_s = time.monotonic() - started
        stage.overhead_s = None if stage.compute_s is None else stage.wall_s - stage.compute_s
        self._note()
        self.observer.stage_finished(stage)
        return stage

    def close(self, status: RunStatus, exit_code: int, message: str = "") -> RunSummary:
        """End the run: send what waits, learn the version numbers, write the summary."""
        hurried = self.stop.requested
        if self.record and not hurried:
            self._learn_versions(self.record.recorder)
        if status == "done":
            self._report()
        if self.record:
            run_state: Status = "FINISHED" if status == "done" else "FAILED" if status == "failed" else "KILLED"
            patience = HURRIED_PATIENCE_S if hurried else CLOSING_PATIENCE_S
            self.summary.tracking = self.record.close(run_state, patience, why=message)
        self.summary.model_versions = {
            stage.name: stage.model_version for stage in self.summary.stages if stage.model_version
        }
        self.summary.message = message
        self.summary.close(status, exit_code, time.time())
        write_summary(self.root, self.summary)
        return self.summary

    def _entry(self, name: str) -> StageSummary:
        """A stage at the beginning of the run; one that is left out keeps what is known of its record."""
        if name in self.chosen:
            return StageSummary(name=name)
        known = {stage.name: stage for stage in self._before.stages}.get(name) if self._before else None
        kept = known.model_dump(include={"recorded", "outputs_hash", "model_version"}) if known else {}
        return StageSummary(name=name, status="left out", **kept)

    def _report(self) -> None:
        """Write the run's page and record it; that of an earlier run stays where this one had nothing to do."""
        reported = any(one.name == "report" and one.status in ("done", "unchanged") for one in self.summary.stages)
        if not reported or (self.record is None and is_current(self.root)):
            return
        from flows.run.report_band import (  # here: it takes what reads the record
            best_policy,
            best_standing,
            write_run_page,
        )

        params, best = self.prepared.params, best_policy(self.root)
        policy = next((one for one in self.summary.stages if one.name == best and one.model_version), None)
        if self.recorder and policy and policy.outputs_hash:  # gates read figures: wait until this run's are sent
            self.recorder.version(policy.outputs_hash, patience_s=CLOSING_PATIENCE_S)
        standing = best_standing(self.root, self.summary, params)
        if write_run_page(self.root, self.summary, params, standing, time.time()) and self.recorder:
            self.recorder.artifact(None, paths.RUN_PAGE)

    def _note(self) -> None:
        with self._noting:
            write_live(self.root, self.summary)

    def _execute(self, stage: StageSummary, on_line: Callable[[str], None]) -> None:
        minutes = self.prepared.request.stage_timeout_minutes
        curves = Curves(self.recorder, stage.name)
        if self.record:
            self.record.start(stage.name)

        def on_event(event: Event) -> None:
            curves.add(event)
            self.observer.stage_event(stage.name, event)

        result = run_stage_process(
            self.root,
            stage.name,
            stop=self.stop,
            on_line=on_line,
            on_event=on_event,
            timeout_s=minutes * 60.0 if minutes else None,
            forks=self.forks,
        )
        curves.send()
        _take_over(stage, result, interrupted=self.stop.requested)
        if result.exit_code and self.record:
            self.record.fail(stage, interrupted=self.stop.requested)

    def _recorded_before(self, name: str) -> StageSummary | None:
        """The stage's entry of the run before, if all there is to record about it is recorded; or another run's."""
        if name in self.changed:
            return None
        known = {stage.name: stage for stage in self._before.stages}.get(name) if self._before else None
        if known is None:
            return noted(self.prepared, name)
        if not known.recorded or (makes_model(name) and known.outputs_hash is None):
            return None
        return known

    def _record(self, stage: StageSummary) -> None:
        before = self._recorded_before(stage.name) if stage.status == "unchanged" else None
        if before is not None:
            stage.recorded, stage.outputs_hash, stage.model_version = True, before.outputs_hash, before.model_version
            if self.record:
                self.record.passed_over(stage)
        elif self.record:
            if stage.status == "unchanged":  # done by a run that was ended before it could record this
                self.record.start(stage.name)
                curves = Curves(self.recorder, stage.name)
                self._replay(stage.name, curves)
            self.record.finish(stage)
            stage.recorded = True
            note(self.prepared, stage)

    def _replay(self, name: str, curves: "Curves") -> None:
        follower = ProgressFollower(self.root / paths.progress_file(name))
        for event in follower.read():
            curves.add(event)
        follower.close()
        curves.send()

    def _learn_versions(self, recorder: "Recorder") -> None:
        patience = CLOSING_PATIENCE_S
        for stage in self.summary.stages:
            if stage.outputs_hash and stage.recorded and not stage.model_version:
                version = recorder.version(stage.outputs_hash, patience_s=patience)
                if version is None:
                    patience = HURRIED_PATIENCE_S  # the store is away; do not wait again for each model
                else:
                    stage.model_version = str(version)
                    note(self.prepared, stage)


def _take_over(stage: StageSummary, result: StageResult, *, interrupted: bool) -> None:
    stage.computed_from, stage.compute_s = result.computed_from, result.compute_s
    stage.peak_memory_mb, stage.tokens = result.peak_memory_mb, result.tokens
    if result.compute_s and result.tokens:
        stage.tokens_per_s = result.tokens / result.compute_s
    stage.message = result.message
    if result.exit_code == 0:
        stage.status = "done" if result.ran else "unchanged"
    else:
        stage.status = "interrupted" if interrupted else "failed"
    stage.exit_code = result.exit_code


class Curves:
    """Collects figures of a stage and hands them on in batches, since each hand-over waits for the disk."""

    def __init__(self, recorder: "Recorder | None", stage: str) -> None:
        self._recorder, self._stage = recorder, stage
        self._rows: list[dict[str, Any]] = []
        self._sent = time.monotonic()

    def add(self, event: Event) -> None:
        """Keep a `progress` event."""
        if event["event"] != "progress":
            return
        self._rows.append({"step": event["step"], "time": event["time"], "metrics": event["metrics"]})
        if time.monotonic() - self._sent > CURVE_SECONDS:
            self.send()

    def send(self) -> None:
        """Hand on what is kept."""
        self._sent = time.monotonic()
        if self._rows and self._recorder:
            self._recorder.metrics(self._stage, self._rows)
        self._rows = []
