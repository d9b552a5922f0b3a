"""One empty MLflow store for all tests: making it costs seconds, copying it nothing."""

from pathlib import Path
from typing import Any

import pytest
from support.tracking import make_checkout

from tasks.tracking.store import Store, open_store


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        from mlflow import MlflowClient

        path = home / "mlflow.db"
        MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def checkout(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return make_checkout(tmp_path / "checkout", empty_store)


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A store that refuses every connection; undo the patch and it is the local one again."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    return monkeypatch


@pytest.fixture
def store(checkout: Path) -> Store:
    return open_store(checkout)


@pytest.fixture
def registered(checkout: Path) -> tuple[Any, ...]:
    """A checkout whose `rlhf-policy` and `rlhf-reward` were recorded, the two models, and their tokenizer."""
    from support.pyfunc import register_two  # here: it takes torch, which other tests of the record do not

    return register_two(checkout)
