"""A place for stages that run in the process of the test."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture
def project(finished_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the finished project, in it, with process-wide settings put back afterwards."""
    folder = Path(shutil.copytree(finished_project, tmp_path / "project", symlinks=True))
    monkeypatch.chdir(folder)
    handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    yield folder
    signal.signal(signal.SIGTERM, handler)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
