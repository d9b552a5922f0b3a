"""Stages in processes of their own that start at once, forked from one that has imported what they need.

The import of torch and transformers takes four of the five seconds of a stage's process on a tiny project. A fork of a
process that did nothing but import is a process like any other: it has a pid, is killed at whatever moment, and leaves
no state in the tests'. Fresh interpreters start every stage once in `conftest.finished_project`.
"""

import contextlib
import functools
import multiprocessing
import os
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest import mock

from tasks.__main__ import main
from tasks.catalogue import STAGES

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 300


def stage_environment(**more: str) -> dict[str, str]:
    """Environment of a stage process in a test; plain, and with one thread for the libraries underneath."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RLHF_", "PREFECT_", "MLFLOW_"))}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **more}


@functools.cache
def forking() -> ForkServerContext:
    """How to start processes in which stages, the store and torchrun's agent are imported already.

    They have the environment of the first call, less what points at stores and servers.
    """
    from tasks.tracking.store import SAFE_ENVIRONMENT

    context = multiprocessing.get_context("forkserver")
    modules = [f"tasks.stages.{stage}.run" for stage in STAGES]
    frame = ("tasks.frame.process", "tasks.frame.several")
    context.set_forkserver_preload([*modules, *frame, "torch.distributed.run", "mlflow"])
    environment = stage_environment(**SAFE_ENVIRONMENT)
    # Modules come from where it is started; a test may stand in a copy of the code that will go.
    with contextlib.chdir(ROOT), mock.patch.dict(os.environ, environment, clear=True):
        forkserver.ensure_running()
    return context


def run_stage(project: Path, stage: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run one stage as `python -m tasks <stage>` would, with `more` in its environment; tell of it as `subprocess`."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        process = forking().Process(target=_become, args=(project, stage, stage_environment(**more), *files))
        process.start()
        process.join(PATIENCE_SECONDS)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(stage, PATIENCE_SECONDS)
        stdout, stderr = (file.read_text() for file in files)
    return subprocess.CompletedProcess(stage, process.exitcode, stdout, stderr)


def _become(project: Path, stage: str, environment: dict[str, str], stdout: Path, stderr: Path) -> None:
    for stream, file in ((sys.stdout, stdout), (sys.stderr, stderr)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream.fileno())
        stream.reconfigure(write_through=True)  # a killed process flushes nothing
    os.chdir(project)
    sys.path.insert(0, str(project))
    os.environ.clear()
    os.environ.update(environment)
    sys.exit(main([stage]))
