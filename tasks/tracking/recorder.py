"""Telling the store about a pipeline run while it goes on: written to the spool first, sent in the background.

Nothing here fails or waits long because the store is away. What it could not take is sent later by this recorder, by
the next one or by `flush`, and is then in the store once.
"""

import contextlib
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rlhf_core.errors import EnvironmentProblem
from tasks import paths
from tasks.tracking import events
from tasks.tracking.background import BackgroundSender
from tasks.tracking.delivery import Delivery
from tasks.tracking.events import DataSet, Event, Judging, Point, Status
from tasks.tracking.flat import dotted, numbers
from tasks.tracking.names import RESPONSES, ModelVersion
from tasks.tracking.registry import find_version
from tasks.tracking.requests import registered_name, registration_request
from tasks.tracking.spool import Spool
from tasks.tracking.store import run_link, tracking_uri

POINTS_AN_EVENT = 500
CLOSING_PATIENCE_S = 60.0
NOTE = "mlflow.note.content"  # what MLflow shows as a run's description


class Recorder:
    """One pipeline run (the parent in MLflow) with its stages (child runs), from the process that runs them.

    A context manager: leaving it ends the parent run (FINISHED, or FAILED after an exception, KILLED after an
    interrupt), tries once more to send what waits, and leaves `delivery`. Methods may be called from several threads.
    A recorder with the key of an earlier run goes on with that run; figures it has already are not recorded again.

    Args:
        root: checkout or worktree of the run.
        run_key: names the run for good; letters, digits, dot, dash, underscore.
        name: shown in MLflow.
        tags: of the parent run; versions get those in `VERSION_TAGS`.
        params: of the parent run; nested mappings become dotted keys.
    """

    def __init__(
        self,
        root: Path,
        run_key: str,
        *,
        name: str = "pipeline",
        tags: Mapping[str, str] | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> None:
        self.root = root
        self.run_key = run_key
        self.delivery = Delivery()
        tracking_uri(root)  # an address that can never do is refused now, not in the background
        self._tags = {key: str(value) for key, value in (tags or {}).items()}
        self._spool = Spool(paths.home(root), run_key)
        self._recorded: set[tuple[str, str, int]] = set()
        self._stage_time: dict[str, int] = {}
        self._writing = threading.Lock()
        self._closed = False
        with contextlib.suppress(EnvironmentProblem):  # what another version wrote ends no run; the sender says it
            for _, event in self._spool.events():
                if isinstance(event, events.MetricsEvent):
                    self._recorded |= {(event.run, point.name, point.step) for point in event.metrics}
        self._background = BackgroundSender(root, self._spool)
        self._begin(run_key, None, name, self._tags, params)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        status: Status = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        self.close(status)

    def start_stage(
        self, stage: str, *, tags: Mapping[str, str] | None = None, params: Mapping[str, Any] | None = None
    ) -> None:
        """Begin the child run of a stage, or take it up again."""
        self._stage_time[stage] = _now_ms()
        self._begin(self._key(stage), self.run_key, stage, {"stage": stage, **(tags or {})}, params)

    def tell(self, stage: str | None, tags: Mapping[str, str]) -> None:
        """Set tags of a stage's run, or of the parent run; a tag that is there already is replaced."""
        self._record(events.TagsEvent(run=self._key(stage), tags={key: str(tags[key]) for key in tags}))

    def inputs(self, stage: str | None, inputs: Iterable[DataSet]) -> None:
        """Record data sets that a run read."""
        listed = tuple(inputs)
        if listed:
            self._record(events.InputsEvent(run=self._key(stage), inputs=listed))

    def figures(self, stage: str | None, metrics: Mapping[str, Any]) -> None:
        """Record headline figures of a run; an undefined one is left out."""
        when = _now_ms()
        self._points(self._key(stage), _at_step_0(metrics, when))

    def metrics(self, stage: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Record curves: rows `{"step": int, "time": seconds since 1970, "metrics": {name: number}}`.

        A name at a step that is recorded already is left out, so rows may be given again after a resume. Give many
        rows at once: each call waits for the disk.
        """
        points: list[Point] = []
        for row in rows:
            time_ms = int(row["time"] * 1000) if "time" in row else _now_ms()
            points += [Point(name, float(value), int(row["step"]), time_ms) for name, value in row["metrics"].items()]
        self._points(self._key(stage), points)

    def next_step(self, stage: str, name: str) -> int:
        """Step after the last one recorded of a curve; 0 where there is none."""
        key = self._key(stage)
        with self._writing:
            return max((step + 1 for run, curve, step in self._recorded if (run, curve) == (key, name)), default=0)

    def artifact(self, stage: str | None, path: Path, folder: str = "") -> None:
        """Record a file or folder as it stands now, below `folder` of the stage's run; None is the parent run."""
        source = path if path.is_absolute() else self.root / path
        self._record(events.ArtifactEvent(run=self._key(stage), folder=folder, kept=self._spool.keep(source)))

    def register(
        self,
        stage: str,
        folder: Path,
        metrics: Mapping[str, float | None],
        *,
        params: Mapping[str, Any] | None = None,
        example: Mapping[str, str] | None = None,
    ) -> str:
        """Ask for the stage's model folder to be registered, once for all times; return its outputs hash.

        It becomes a candidate by `set_candidates` only.

        Args:
            folder: `save_pretrained` folder, relative to the root or absolute.
            metrics: headline figures; None for an undefined one. What is no number is left out.
            params: settings shown on the logged model; nested mappings become dotted keys.
            example: `prompt` (and `response` for a reward model) shown as the version's input example.

        Raises:
            ConfigError: the stage makes no model.
            EnvironmentProblem: no git checkout, or `dvc.lock` does not know the stage.
        """
        source = folder if folder.is_absolute() else self.root / folder
        request = registration_request(
            self.root, stage, source, tags=self._tags, params=params or {}, metrics=metrics, example=example or {}
        )
        self._record(
            events.RegisterEvent(
                run=self._key(stage),
                kept=self._spool.keep(source),
                time_ms=self._stage_time.get(stage, _now_ms()),
                request=request,
            )
        )
        return request.content

    def attach(
        self,
        stage: str,
        content: str,
        metrics: Mapping[str, float | None],
        *,
        verdict: Judging | None = None,
    ) -> None:
        """Add figures that were measured later to the version with outputs hash `content`; gates judge by them.

        Args:
            verdict: how it was compared with SFT, for the version's description.
        """
        model, figures = registered_name(stage), numbers(metrics)
        self._record(
            events.AttachEvent(model=model, outputs_hash=content, metrics=figures, verdict=verdict, time_ms=_now_ms())
        )

    def attach_responses(self, stage: str, content: str, table: Path, *, rows_of: str) -> None:
        """Keep beside a version what it answered to the evaluation prompts, for later comparisons.

        Args:
            table: the evaluation's `responses.parquet`.
            rows_of: value of its column `model`: `sft`, `ppo`, `dpo`.
        """
        import pyarrow.parquet as pq  # here: `rlhf status` takes this package, and answers at once

        rows = pq.read_table(self.root / table, filters=[("model", "==", rows_of)])
        kept, path = self._spool.new_file(RESPONSES)
        pq.write_table(rows, path)
        self._record(events.EvidenceEvent(model=registered_name(stage), outputs_hash=content, kept=kept))

    def set_candidates(self, contents: Mapping[str, str]) -> None:
        """Point the alias `candidate` at versions of one lineage together: stage -> outputs hash."""
        versions = {registered_name(stage): content for stage, content in contents.items()}
        self._record(events.CandidatesEvent(run=self.run_key, versions=versions, time_ms=_now_ms()))

    def finish_stage(
        self, stage: str, status: Status = "FINISHED", metrics: Mapping[str, Any] | None = None, *, why: str = ""
    ) -> None:
        """End a stage's run with its headline figures; `why` it failed."""
        key = self._key(stage)
        self._points(key, _at_step_0(metrics or {}, self._stage_time.get(stage, _now_ms())))
        self._why(stage, why)
        self._record(events.EndEvent(run=key, status=status, time_ms=_now_ms()))

    def version(self, content: str, patience_s: float = CLOSING_PATIENCE_S) -> ModelVersion | None:
        """The registered version with this outputs hash, once everything recorded so far is sent.

        None when the store is away or takes longer than `patience_s` seconds.
        """
        self._background.drain(patience_s)
        sender = self._background.sender
        known = sender.versions.get(content) if sender else None
        if sender is None or known is None:
            return None
        with contextlib.suppress(Exception):  # the store may go away at any moment; its last answer will do
            return find_version(sender.store, known.name, content)
        return known

    def run_id(self, stage: str | None = None) -> str | None:
        """MLflow's id of a stage's run, or of the parent's; None while the store has not taken it."""
        sender = self._background.sender
        with contextlib.suppress(Exception):  # a link is worth nothing more than this try
            return sender.run_id(self._key(stage)) if sender else None
        return None

    def page(self, server: str, stage: str | None = None, artifact: str = "") -> str:
        """Address of a run's page, or of one of its artifacts, in the MLflow UI at `server`; empty as for `run_id`."""
        run_id, sender = self.run_id(stage), self._background.sender
        if run_id is None or sender is None:
            return ""
        return run_link(sender.store, run_id, server) + (f"/artifacts/{artifact}" if artifact else "")

    def close(self, status: Status = "FINISHED", patience_s: float = CLOSING_PATIENCE_S, *, why: str = "") -> Delivery:
        """End the parent run, try once more to send what waits, stop. Calling it again does nothing."""
        if not self._closed:
            self._closed = True
            self._why(None, why)
            self._record(events.EndEvent(run=self.run_key, status=status, time_ms=_now_ms()))
            self.delivery = self._background.stop(patience_s)
        return self.delivery

    def _why(self, stage: str | None, why: str) -> None:
        """Where people look for it: the run's description, and a tag to filter by."""
        if why:
            self.tell(stage, {"failure": why, NOTE: f"**Failed**: {why}"})

    def _key(self, stage: str | None) -> str:
        return f"{self.run_key}/{stage}" if stage else self.run_key

    def _begin(
        self, key: str, parent: str | None, name: str, tags: Mapping[str, str], params: Mapping[str, Any] | None
    ) -> None:
        own = {tag: str(value) for tag, value in tags.items()}
        self._record(events.RunEvent(run=key, parent=parent, name=name, tags=own, time_ms=_now_ms()))
        if params:
            self._record(events.ParamsEvent(run=key, params=dict(dotted(params))))

    def _points(self, key: str, points: Sequence[Point]) -> None:
        with self._writing:
            fresh = []
            for point in points:
                if (key, point.name, point.step) not in self._recorded:
                    self._recorded.add((key, point.name, point.step))
                    fresh.append(point)
        for start in range(0, len(fresh), POINTS_AN_EVENT):
            self._record(events.MetricsEvent(run=key, metrics=tuple(fresh[start : start + POINTS_AN_EVENT])))

    def _record(self, event: Event) -> None:
        with self._writing:
            self._spool.append([event])
        self._background.wake()


def _at_step_0(metrics: Mapping[str, Any], time_ms: int) -> list[Point]:
    """Headline figures as points; an undefined one has none."""
    return [Point(name, value, 0, time_ms) for name, value in numbers(metrics).items() if value is not None]


def _now_ms() -> int:
    return int(time.time() * 1000)
