"""A registry of its own for the commands that take a version out of it."""

from pathlib import Path

import pytest
from support.pyfunc import register_two
from support.tracking import make_checkout

from tests.tasks.tracking.conftest import empty_store

__all__ = ["empty_store"]


@pytest.fixture
def registered(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout, and the current folder, whose registry has `rlhf-policy/1` and `rlhf-reward/1`."""
    for name in ("MLFLOW_TRACKING_URI", "RLHF_SIGNING_KEY", "RLHF_TRUSTED_KEYS"):
        monkeypatch.delenv(name, raising=False)
    checkout = register_two(make_checkout(tmp_path / "checkout", empty_store))[0]
    monkeypatch.chdir(checkout)
    return checkout
