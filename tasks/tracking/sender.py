"""What each kind of event means to the store. Every one may be applied twice and leaves what once would leave.

Kinds: `run` (a pipeline run or a stage's child run begins), `params`, `tags`, `inputs` (data sets that a run read),
`metrics` (rows of name, value, step, milliseconds), `artifact`, `register`, `attach` (figures of a version),
`evidence` (a file beside a version), `candidates` (versions that are proposed together), `end`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.tracking import registration, registry
from tasks.tracking.fitting import LONGEST_PARAM, LONGEST_RUN_TAG, Cutter
from tasks.tracking.names import PARAMS_CHANGED, RUN_KEY, ModelVersion, evidence_folder
from tasks.tracking.spool import Event, Spool
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
        self._apply: dict[str, Callable[[Event], None]] = {
            "run": self._begin,
            "params": self._params,
            "tags": self._tags,
            "inputs": self._inputs,
            "artifact": self._artifact,
            "register": self._register,
            "attach": self._attach,
            "evidence": self._evidence,
            "candidates": self._candidates,
            "end": self._end,
        }

    def send(self, events: list[Event]) -> None:
        """Apply one event, or several of kind `metrics` that belong to one run."""
        if events[0]["kind"] == "metrics":
            self._metrics(events)
        else:
            self._apply[events[0]["kind"]](events[0])

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
            for key in (event.get("run"), event.get("parent")):
                if key and self._find_run(key) is None:
                    self._run_ids.pop(key, None)  # gone for good: the next try begins it anew
        except Deleted as deleted:
            return str(deleted)
        except Exception as error:  # the store went away while it was asked: then that is what stands in the way
            return first_line(error)
        return None

    def in_words(self, event: Event) -> str:
        """`registration of rlhf-sft`: what an event was to record."""
        match event["kind"]:
            case "register":
                return f"registration of {event['request']['name']}"
            case "attach" | "evidence":
                return f"figures of {event['model']}" if event["kind"] == "attach" else f"answers of {event['model']}"
            case "candidates":
                return f"candidates {', '.join(event['versions'])}"
            case "run":
                return f"run {event['run']}"
            case kind:
                return f"{kind} of {event['run']}"

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

    def _known_run(self, event: Event) -> str:
        run_id = self.run_id(event["run"])
        if run_id is None:  # the store is another one now, or was cleaned for good: begin the run there too
            beginning = self.spool.beginning_of(event["run"])
            if beginning is None:
                raise Unsendable(f"run {event['run']} is not in the store")
            self._begin(beginning)
            run_id = self._run_ids[event["run"]]
        return run_id

    def _begin(self, event: Event) -> None:
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        run_id = self.run_id(event["run"])
        if run_id is not None:  # a run that was ended and is taken up again, or an event sent twice
            self.store.client.update_run(run_id, status="RUNNING")
            return
        tags = {key: self._cut(f"tag {key}", value, LONGEST_RUN_TAG) for key, value in event["tags"].items()}
        tags[RUN_KEY] = event["run"]
        if event["parent"]:
            tags[MLFLOW_PARENT_RUN_ID] = self._known_run({"run": event["parent"]})
        run = self.store.client.create_run(
            self.store.experiment_id, start_time=event["time_ms"], tags=tags, run_name=event["name"]
        )
        self._run_ids[event["run"]] = run.info.run_id

    def _params(self, event: Event) -> None:
        """MLflow lets no parameter change: what a resumed run changed stands in a tag beside them."""
        from mlflow.entities import Param

        run_id = self._known_run(event)
        wanted = {key: self._cut(key, value, LONGEST_PARAM) for key, value in sorted(event["params"].items())}
        standing = self.store.client.get_run(run_id).data.params
        params = [Param(key, value) for key, value in wanted.items() if key not in standing]
        for start in range(0, len(params), PARAMS_A_BATCH):
            self.store.client.log_batch(run_id, params=params[start : start + PARAMS_A_BATCH])
        changed = {key: value for key, value in wanted.items() if standing.get(key, value) != value}
        if changed:
            text = "; ".join(f"{key}: {standing[key]} -> {value}" for key, value in changed.items())
            self.store.client.set_tag(run_id, PARAMS_CHANGED, self._cut(PARAMS_CHANGED, text, LONGEST_RUN_TAG))

    def _tags(self, event: Event) -> None:
        run_id = self._known_run(event)
        for key, value in event["tags"].items():
            self.store.client.set_tag(run_id, key, self._cut(f"tag {key}", value, LONGEST_RUN_TAG))

    def _inputs(self, event: Event) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(
                Dataset(name=one["name"], digest=one["digest"], source_type="local", source=one["source"]),
                tags=[InputTag("mlflow.data.context", one["context"])],
            )
            for one in event["inputs"]
        ]
        self.store.client.log_inputs(self._known_run(event), datasets=inputs)

    def _metrics(self, events: list[Event]) -> None:
        from mlflow.entities import Metric

        rows = [row for event in events for row in event["metrics"]]
        metrics = [Metric(name, value, time_ms, step) for name, value, step, time_ms in rows]
        for start in range(0, len(metrics), METRICS_A_BATCH):
            self.store.client.log_batch(self._known_run(events[0]), metrics=metrics[start : start + METRICS_A_BATCH])

    def _artifact(self, event: Event) -> None:
        path = self._kept(event)
        log = self.store.client.log_artifacts if path.is_dir() else self.store.client.log_artifact
        log(self._known_run(event), str(path), event["folder"] or None)

    def _register(self, event: Event) -> None:
        request: dict[str, Any] = event["request"]
        version = registration.register_version(
            self.store, self._known_run(event), folder=self._kept(event), time_ms=event["time_ms"], **request
        )
        self.versions[version.outputs_hash] = version

    def _attach(self, event: Event) -> None:
        registration.attach_metrics(
            self.store, self._version(event), event["metrics"], event["time_ms"], event["verdict"]
        )

    def _evidence(self, event: Event) -> None:
        version = self._version(event)
        self.store.client.log_artifact(version.run_id, str(self._kept(event)), evidence_folder(version))

    def _candidates(self, event: Event) -> None:
        proposed: Mapping[str, str] = event["versions"]
        versions = [self._version({"model": name, "outputs_hash": content}) for name, content in proposed.items()]
        registration.set_candidates(self.store, versions, event["time_ms"])

    def _kept(self, event: Event) -> Path:
        path = self.spool.files / event["kept"]
        if not path.exists():
            raise Unsendable(f"{path}: gone")
        return path

    def _version(self, event: Event) -> ModelVersion:
        version = registry.find_version(self.store, event["model"], event["outputs_hash"])
        if version is None:
            raise Unsendable(
                f"{event['model']} has no version with outputs hash {event['outputs_hash'][:12]}: it was not "
                "registered, or was deleted in MLflow"
            )
        return version

    def _end(self, event: Event) -> None:
        self.store.client.set_terminated(self._known_run(event), status=event["status"], end_time=event["time_ms"])
