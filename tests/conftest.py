"""A whole small project in a folder of its own, for tests that run real stages."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two threads on tiny tensors only fight

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from support.warm_processes import stage_environment

from rlhf_core import faults

ROOT = Path(__file__).parents[1]
CODE = ("rlhf_core", "tasks", "flows", "mlflow", "models", "profiles")
FILES = ("dvc.yaml", "params.yaml", "pyproject.toml", "constraints.txt", ".gitignore", ".dvcignore")
KEPT_LINES = {"demonstrations": 400, "prompts": 70, "heldout_prompts": 60, "graded": 100, "votes": 100}


def run_stage_afresh(project: Path, stage: str) -> subprocess.CompletedProcess[str]:
    """Run one stage in an interpreter of its own."""
    command = [sys.executable, "-m", "tasks", stage]
    return subprocess.run(
        command, cwd=project, env=stage_environment(), capture_output=True, text=True, timeout=300, check=False
    )


def make_project(folder: Path) -> Path:
    """Copy the code as it stands and the head of every data file into `folder`, with the tiny profile's parameters."""
    from tasks.params import resolve_params  # here: the tests of rlhf_core need nothing of tasks

    ignore = shutil.ignore_patterns("__pycache__")
    for name in CODE:
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    (folder / "params.yaml").write_text(resolve_params(ROOT / "params.yaml", ROOT / "profiles/tiny.yaml", []))
    (folder / "data").mkdir()
    for name, count in KEPT_LINES.items():
        lines = (ROOT / f"data/{name}.jsonl").read_text().split("\n")
        (folder / f"data/{name}.jsonl").write_text("\n".join(lines[:count]) + "\n")
    return folder


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first of pytest's workers to need it makes, and all read."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    done = folder.with_suffix(".done")
    with FileLock(folder.with_suffix(".lock")):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            done.touch()
    return folder


def finish_project(folder: Path) -> None:
    """Make a project and run all its stages, each in a fresh interpreter."""
    from flows.run.request import pipeline_stages  # here: see above

    make_project(folder)
    for stage in pipeline_stages(folder):
        done = run_stage_afresh(folder, stage)
        assert done.returncode == 0, f"{stage} failed:\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="session")
def finished_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small project in which every stage has run once without a break. Copy it; do not write to it."""
    return made_once(tmp_path_factory, "finished", finish_project)


@pytest.fixture(autouse=True)
def no_fault_counted() -> None:
    """How often a named point was passed counts within one test, whatever ran before it in this process."""
    faults.hits.clear()


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """For several workers: files that run stages or start servers come first, so that none is left alone with one."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        slow = {
            item.path
            for item in items
            if item.get_closest_marker("integration") or "finished_project" in item.fixturenames
        }
        items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile`."""
    if config.getoption("dist") != "loadfile":
        return None
    from workers import OneServer

    return OneServer(config, log)
