"""Where runs and models are recorded: one MLflow store for a checkout and all its worktrees.

The address is `MLFLOW_TRACKING_URI` where it is set, else a SQLite file in the main checkout's `.rlhf`. A fresh
SQLite store breaks for good when several processes create it at once, so opening happens under a file lock.
"""

import json
import logging
import os
import shlex
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from rlhf_core.errors import ConfigError, EnvironmentProblem
from rlhf_core.state.atomic import write_json
from tasks import paths
from tasks.loopback import reach_loopback_directly
from tasks.tracking.names import EXPERIMENT, RUN_KEY

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

DATABASE = paths.STATE / "mlflow.db"
ARTIFACTS = paths.STATE / "mlartifacts"
EXPERIMENT_NOTE = paths.STATE / "mlflow-experiment.json"
LOCK_PATIENCE_S = 60.0
_DEFAULT = threading.Lock()
OPENS_ON_RUNS = {"mlflow.experimentKind": "custom_model_development"}  # its page is a list of runs, not of traces

# A store that is away must be noticed in seconds: what could not be sent waits in the spool anyway.
SAFE_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_RECORD_ENV_VARS_IN_MODEL_LOGGING": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "GIT_PYTHON_REFRESH": "quiet",
}


@dataclass(frozen=True)
class Store:
    """An open store.

    Attributes:
        uri: its address, with any password.
        home: main checkout, which holds the locks, the spool and the audit trail.
        experiment_id: MLflow experiment that every run belongs to.
    """

    uri: str
    home: Path
    experiment_id: str

    @cached_property
    def client(self) -> "MlflowClient":
        """MLflow's client for this store; does not touch the process-wide tracking address."""
        from mlflow import MlflowClient

        # what it logs, a traceback of some fifty lines, is raised as well, and said in one line
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        return MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)


def tracking_uri(root: Path) -> str:
    """Address of the store that a checkout or worktree records to. Cheap: imports nothing.

    Raises:
        ConfigError: `MLFLOW_TRACKING_URI` names a plain folder, which MLflow no longer keeps a registry in.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{paths.home(root) / DATABASE}"
    if urllib.parse.urlparse(uri).scheme in ("", "file"):
        raise ConfigError(
            f"MLFLOW_TRACKING_URI={uri}: a folder holds no model registry. "
            "Fix: unset it, or give sqlite:///…, postgresql://… or http(s)://…"
        )
    return uri


def public_uri(uri: str) -> str:
    """An address as it may be shown: without user name and password."""
    parts = urllib.parse.urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def open_store(root: Path) -> Store:
    """Open the store, creating it and its experiment when they are not there.

    An experiment that somebody renamed in the MLflow page stays the one that runs belong to.

    Raises:
        ConfigError: the address cannot hold a registry.
        EnvironmentProblem: the store does not answer.
    """
    uri, home = tracking_uri(root), paths.home(root)
    for name, value in SAFE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    reach_loopback_directly()
    with lock(home, "mlflow-store"):
        try:
            store = Store(uri, home, experiment_id="")
            experiment = store.client.get_experiment_by_name(EXPERIMENT) or _renamed(store)
            if experiment is None:
                place = str(home / ARTIFACTS) if uri.startswith("sqlite:") else None
                number = store.client.create_experiment(EXPERIMENT, artifact_location=place, tags=OPENS_ON_RUNS)
            else:
                number = experiment.experiment_id
            write_json(home / EXPERIMENT_NOTE, {"uri": public_uri(uri), "experiment_id": number})
            return Store(uri, home, number)
        except Exception as error:  # whatever kept the store from answering, the cure is the same
            raise EnvironmentProblem(
                f"{public_uri(uri)}: the MLflow store does not answer ({first_line(error)}). "
                "Fix: start it (rlhf up) or correct MLFLOW_TRACKING_URI"
            ) from error


def _renamed(store: Store) -> "Experiment | None":
    """The experiment that had our name when the store was opened last, if runs of ours are in it; else None."""
    from mlflow.entities import ViewType
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

    noted = _noted(store.home, store.uri)
    if noted is None:
        return None
    try:
        ours = store.client.search_runs([noted], f"tags.`{RUN_KEY}` LIKE '%'", ViewType.ALL, max_results=1)
        return store.client.get_experiment(noted) if ours else None
    except MlflowException as error:
        if error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            return None
        raise


def _noted(home: Path, uri: str) -> str | None:
    """Id of the experiment that was noted when the store at this address was opened last."""
    try:
        noted = json.loads((home / EXPERIMENT_NOTE).read_text())
        return str(noted["experiment_id"]) if noted["uri"] == public_uri(uri) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


@contextmanager
def lock(home: Path, name: str, patience_s: float = LOCK_PATIENCE_S) -> Iterator[None]:
    """Hold the file lock `.rlhf/locks/<name>.lock`.

    Raises:
        EnvironmentProblem: another process holds it longer than `patience_s` seconds.
    """
    path = home / paths.LOCKS / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(path)
    try:
        held.acquire(timeout=patience_s)
    except Timeout:
        raise EnvironmentProblem(
            f"{path}: held by another process for more than {patience_s:.0f} s. Fix: wait for it or end it"
        ) from None
    try:
        yield
    finally:
        held.release()


@contextmanager
def as_default(store: Store) -> Iterator[None]:
    """Make a store the process's default one for a moment: registering a logged model looks it up there."""
    with _DEFAULT:
        before = os.environ.get("MLFLOW_TRACKING_URI")
        os.environ["MLFLOW_TRACKING_URI"] = store.uri
        try:
            yield
        finally:
            if before is None:
                del os.environ["MLFLOW_TRACKING_URI"]
            else:
                os.environ["MLFLOW_TRACKING_URI"] = before


def run_link(store: Store, run_id: str, server: str) -> str:
    """Page of a run in the MLflow UI that `server` (such as http://127.0.0.1:5000) serves."""
    return f"{server.rstrip('/')}/#/experiments/{store.experiment_id}/runs/{run_id}"


def runs_page(root: Path, server: str) -> str:
    """The list of all runs in the MLflow UI that `server` serves. Cheap: the experiment was noted when it was opened.

    MLflow's own front page is about traces of agents; this one is in its mode for training.
    """
    noted = _noted(paths.home(root), tracking_uri(root))
    if noted is None:
        return server
    return f"{server.rstrip('/')}/#/experiments/{noted}/runs?workflowType=machine_learning"


def by_hand(store: Store, command: str) -> str:
    """A command of MLflow's for a person to type: with the store's address, unless the environment has it already."""
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return command
    return f"MLFLOW_TRACKING_URI={shlex.quote(public_uri(store.uri))} {command}"


def first_line(error: BaseException) -> str:
    """First line of an error, short enough for a one-line message; of a database's, what the database itself said."""
    cause = error
    while cause.__cause__ is not None and not hasattr(cause, "orig"):
        cause = cause.__cause__
    said = getattr(cause, "orig", None) or error  # SQLAlchemy puts hints on its own use, and the statement, around it
    text = str(said).strip() or type(error).__name__
    return text.splitlines()[0][:200]
