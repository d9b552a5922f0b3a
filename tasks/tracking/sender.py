"""What each kind of event means to the store. Every one may be applied twice and leaves what once would leave.

Kinds: `run` (a pipeline run or a stage's child run begins), `params`, `metrics` (rows of name, value, step,
milliseconds), `artifact`, `register`, `attach` (figures of a version),
`evidence` (a file beside a version), `candidate`, `end`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.tracking import registry
from tasks.tracking.names import RUN_KEY, ModelVersion, evidence_folder
from tasks.tracking.spool import Event, Spool
from tasks.tracking.store import Store

METRICS_A_BATCH = 1000  # MLflow's limits for one request
PARAMS_A_BATCH = 100
LONGEST_PARAM = 6000
PERMANENT = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST"}


class Unsendable(Exception):
    """An event that no store will ever take; the message says why."""


def will_never_be_taken(error: Exception) -> bool:
    """Whether sending the same event later must fail the same way."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.error_code in PERMANENT
    return isinstance(error, Unsendable | registry.ContentChanged)


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
        self._apply: dict[str, Callable[[Event], None]] = {
            "run": self._begin,
            "params": self._params,
            "artifact": self._artifact,
            "register": self._register,
            "attach": self._attach,
            "evidence": self._evidence,
            "candidate": self._candidate,
            "end": self._end,
        }

    def send(self, events: list[Event]) -> None:
        """Apply one event, or several of kind `metrics` that belong to one run."""
        if events[0]["kind"] == "metrics":
            self._metrics(events)
        else:
            self._apply[events[0]["kind"]](events[0])

    def run_id(self, key: str) -> str | None:
        """MLflow's id of the run with this key; None when it is not there."""
        if key not in self._run_ids:
            found = self.store.client.search_runs(
                [self.store.experiment_id], f"tags.`{RUN_KEY}` = '{key}'", order_by=["attributes.start_time ASC"]
            )
            if not found:
                return None
            self._run_ids[key] = found[0].info.run_id
        return self._run_ids[key]

    def _known_run(self, event: Event) -> str:
        run_id = self.run_id(event["run"])
        if run_id is None:
            raise Unsendable(f"run {event['run']} is not in the store")
        return run_id

    def _begin(self, event: Event) -> None:
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        run_id = self.run_id(event["run"])
        if run_id is not None:  # a run that was ended and is taken up again, or an event sent twice
            self.store.client.update_run(run_id, status="RUNNING")
            return
        tags = {**event["tags"], RUN_KEY: event["run"]}
        if event["parent"]:
            tags[MLFLOW_PARENT_RUN_ID] = self._known_run({"run": event["parent"]})
        run = self.store.client.create_run(
            self.store.experiment_id, start_time=event["time_ms"], tags=tags, run_name=event["name"]
        )
        self._run_ids[event["run"]] = run.info.run_id

    def _params(self, event: Event) -> None:
        from mlflow.entities import Param

        params = [Param(key, value[:LONGEST_PARAM]) for key, value in sorted(event["params"].items())]
        for start in range(0, len(params), PARAMS_A_BATCH):
            self.store.client.log_batch(self._known_run(event), params=params[start : start + PARAMS_A_BATCH])

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
        version = registry.register_version(
            self.store, self._known_run(event), folder=self._kept(event), time_ms=event["time_ms"], **request
        )
        self.versions[version.outputs_hash] = version

    def _attach(self, event: Event) -> None:
        registry.attach_metrics(self.store, self._version(event), event["metrics"], event["time_ms"])

    def _evidence(self, event: Event) -> None:
        version = self._version(event)
        self.store.client.log_artifact(version.run_id, str(self._kept(event)), evidence_folder(version))

    def _candidate(self, event: Event) -> None:
        registry.set_candidate(self.store, self._version(event), event["time_ms"])

    def _kept(self, event: Event) -> Path:
        path = self.spool.files / event["kept"]
        if not path.exists():
            raise Unsendable(f"{path}: gone")
        return path

    def _version(self, event: Event) -> ModelVersion:
        version = registry.find_version(self.store, event["model"], event["outputs_hash"])
        if version is None:
            raise Unsendable(f"{event['model']}: no version with outputs hash {event['outputs_hash'][:12]}")
        return version

    def _end(self, event: Event) -> None:
        self.store.client.set_terminated(self._known_run(event), status=event["status"], end_time=event["time_ms"])
