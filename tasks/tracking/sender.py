"""What each kind of event means to the store. Every one may be applied twice and leaves what once would leave."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, assert_never

from tasks.tracking import registration, registry
from tasks.tracking.events import (
    ArtifactEvent,
    AttachEvent,
    CandidatesEvent,
    EndEvent,
    Event,
    EvidenceEvent,
    InputsEvent,
    MetricsEvent,
    OfRun,
    ParamsEvent,
    Point,
    RegisterEvent,
    RunEvent,
    TagsEvent,
    WithFile,
)
from tasks.tracking.fitting import LONGEST_PARAM, LONGEST_RUN_TAG, Cutter
from tasks.tracking.names import PARAMS_CHANGED, RUN_KEY, ModelVersion, evidence_folder
from tasks.tracking.spool import Spool
from tasks.tracking.store import Store, by_hand, first_line

if TYPE_CHECKING:
    from mlflow.entities import Run

METRICS_A_BATCH = 1000  # MLflow's limits for one request
PARAMS_A_BATCH = 100
REFUSING = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST"}


class Unsendable(Exception):
    """An event that the store as it is cannot take; the message says why."""


class Deleted(Exception):
    """Somebody deleted the run that an event belongs to; the message says so, with the cure."""


def would_not_be_taken(error: Exception) -> bool:
    """Whether sending the same event to the same store must fail the same way."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.error_code in REFUSING
    return isinstance(error, Unsendable | registration.ContentChanged)


class Sender:
    """Applies the events of one spool to one store.

    Attributes:
        versions: what `register` events of this sender led to, by outputs hash.
    """

    def __init__(self, store: Store, spool: Spool) -> None:
        self.store = store
        self.spool = spool
        self.versions: dict[str, ModelVersion] = {}
        self._run_ids: dict[str, str] = {}
        self._cut = Cutter()

    def send(self, events: Sequence[Event]) -> None:
        """Apply one event, or several `MetricsEvent` of one run."""
        match event := events[0]:
            case RunEvent():
                self._begin(event)
            case ParamsEvent():
                self._params(event)
            case TagsEvent():
                self._tags(event)
            case InputsEvent():
                self._inputs(event)
            case MetricsEvent():
                several = [one for one in events if isinstance(one, MetricsEvent)]
                self._metrics(event.run, [point for one in several for point in one.metrics])
            case ArtifactEvent():
                self._artifact(event)
            case RegisterEvent():
                self._register(event)
            case EndEvent():
                self._end(event)
            case AttachEvent():
                self._attach(event)
            case EvidenceEvent():
                self._evidence(event)
            case CandidatesEvent():
                self._candidates(event)
            case _:
                assert_never(event)

    def take_cut(self) -> tuple[str, ...]:
        """Names of values that were cut since the last call."""
        return self._cut.take()

    def run_id(self, key: str) -> str | None:
        """MLflow's id of the run with this key; None when it is not there.

        Raises:
            Deleted: it was deleted in MLflow.
        """
        if key not in self._run_ids:
            run = self._find_run(key)
            if run is None:
                return None
            self._run_ids[key] = run.info.run_id
        return self._run_ids[key]

    def obstacle(self, event: Event) -> str | None:
        """What somebody deleted in MLflow that stands in the way of an event, with the cure; None where nothing is."""
        try:
            experiment = self.store.client.get_experiment(self.store.experiment_id)
            if experiment.lifecycle_stage == "deleted":
                restore = f"mlflow experiments restore --experiment-id {experiment.experiment_id}"
                return (
                    f"experiment {experiment.name!r} was deleted in MLflow. Fix: restore it "
                    f"({by_hand(self.store, restore)})"
                )
            own, parent = isinstance(event, OfRun) and event.run, isinstance(event, RunEvent) and event.parent
            for key in (own, parent):
                if key and self._find_run(key) is None:
                    self._run_ids.pop(key, None)  # gone for good: the next try begins it anew
        except Deleted as deleted:
            return str(deleted)
        except Exception as error:  # the store went away while it was asked: then that is what stands in the way
            return first_line(error)
        return None

    def _find_run(self, key: str) -> "Run | None":
        from mlflow.entities import ViewType

        found = self.store.client.search_runs(
            [self.store.experiment_id],
            f"tags.`{RUN_KEY}` = '{key}'",
            run_view_type=ViewType.ALL,
            order_by=["attributes.start_time ASC"],
        )
        alive = [run for run in found if run.info.lifecycle_stage == "active"]
        if found and not alive:
            restore = by_hand(self.store, f"mlflow runs restore --run-id {found[0].info.run_id}")
            raise Deleted(
                f"run {key} was deleted in MLflow. Fix: restore it ({restore}), or give its records up "
                f"(delete .rlhf/spool/{self.spool.path.name})"
            )
        return alive[0] if alive else None

    def _known_run(self, key: str) -> str:
        run_id = self.run_id(key)
        if run_id is None:  # the store is another one now, or was cleaned for good: begin the run there too
            beginning = self.spool.beginning_of(key)
            if beginning is None:
                raise Unsendable(f"run {key} is not in the store")
            self._begin(beginning)
            run_id = self._run_ids[key]
        return run_id

    def _begin(self, event: RunEvent) -> None:
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        run_id = self.run_id(event.run)
        if run_id is not None:  # a run that was ended and is taken up again, or an event sent twice
            self.store.client.update_run(run_id, status="RUNNING")
            return
        tags = {key: self._cut(f"tag {key}", value, LONGEST_RUN_TAG) for key, value in event.tags.items()}
        tags[RUN_KEY] = event.run
        if event.parent:
            tags[MLFLOW_PARENT_RUN_ID] = self._known_run(event.parent)
        run = self.store.client.create_run(
            self.store.experiment_id, start_time=event.time_ms, tags=tags, run_name=event.name
        )
        self._run_ids[event.run] = run.info.run_id

    def _params(self, event: ParamsEvent) -> None:
        """MLflow lets no parameter change: what a resumed run changed stands in a tag beside them."""
        from mlflow.entities import Param

        run_id = self._known_run(event.run)
        wanted = {key: self._cut(key, value, LONGEST_PARAM) for key, value in sorted(event.params.items())}
        standing = self.store.client.get_run(run_id).data.params
        params = [Param(key, value) for key, value in wanted.items() if key not in standing]
        for start in range(0, len(params), PARAMS_A_BATCH):
            self.store.client.log_batch(run_id, params=params[start : start + PARAMS_A_BATCH])
        changed = {key: value for key, value in wanted.items() if standing.get(key, value) != value}
        if changed:
            text = "; ".join(f"{key}: {standing[key]} -> {value}" for key, value in changed.items())
            self.store.client.set_tag(run_id, PARAMS_CHANGED, self._cut(PARAMS_CHANGED, text, LONGEST_RUN_TAG))

    def _tags(self, event: TagsEvent) -> None:
        run_id = self._known_run(event.run)
        for key, value in event.tags.items():
            self.store.client.set_tag(run_id, key, self._cut(f"tag {key}", value, LONGEST_RUN_TAG))

    def _inputs(self, event: InputsEvent) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(
                Dataset(name=one.name, digest=one.digest, source_type="local", source=one.source),
                tags=[InputTag("mlflow.data.context", one.context)],
            )
            for one in event.inputs
        ]
        self.store.client.log_inputs(self._known_run(event.run), datasets=inputs)

    def _metrics(self, run: str, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(point.name, point.value, point.time_ms, point.step) for point in points]
        for start in range(0, len(metrics), METRICS_A_BATCH):
            self.store.client.log_batch(self._known_run(run), metrics=metrics[start : start + METRICS_A_BATCH])

    def _artifact(self, event: ArtifactEvent) -> None:
        path = self._file(event)
        log = self.store.client.log_artifacts if path.is_dir() else self.store.client.log_artifact
        log(self._known_run(event.run), str(path), event.folder or None)

    def _register(self, event: RegisterEvent) -> None:
        run_id, folder = self._known_run(event.run), self._file(event)
        version = registration.register_version(self.store, run_id, event.request, folder, event.time_ms)
        self.versions[version.outputs_hash] = version

    def _attach(self, event: AttachEvent) -> None:
        version = self._version(event.model, event.outputs_hash)
        registration.attach_metrics(self.store, version, event.metrics, event.time_ms, event.verdict)

    def _evidence(self, event: EvidenceEvent) -> None:
        version = self._version(event.model, event.outputs_hash)
        self.store.client.log_artifact(version.run_id, str(self._file(event)), evidence_folder(version))

    def _candidates(self, event: CandidatesEvent) -> None:
        versions = [self._version(name, content) for name, content in event.versions.items()]
        registration.set_candidates(self.store, versions, event.time_ms)

    def _end(self, event: EndEvent) -> None:
        self.store.client.set_terminated(self._known_run(event.run), status=event.status, end_time=event.time_ms)

    def _file(self, event: WithFile) -> Path:
        path = self.spool.files / event.kept
        if not path.exists():
            raise Unsendable(f"{path}: gone")
        return path

    def _version(self, model: str, content: str) -> ModelVersion:
        version = registry.find_version(self.store, model, content)
        if version is None:
            raise Unsendable(
                f"{model} has no version with outputs hash {content[:12]}: it was not "
                "registered, or was deleted in MLflow"
            )
        return version
