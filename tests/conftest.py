"""A whole small project in a folder of its own, for tests that run real stages."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two threads on tiny tensors only fight

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.params import resolve_params

ROOT = Path(__file__).parents[1]
CODE = ("rlhf_core", "tasks", "flows", "mlflow", "models", "profiles")
FILES = ("dvc.yaml", "params.yaml", "pyproject.toml", "constraints.txt", ".gitignore", ".dvcignore")
KEPT_LINES = {"demonstrations": 400, "prompts": 70, "heldout_prompts": 60, "graded": 100, "votes": 100}


def stage_environment(**more: str) -> dict[str, str]:
    """Environment of a stage process in a test; plain, and with one thread for the libraries underneath."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RLHF_", "PREFECT_", "MLFLOW_"))}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **more}


def run_stage(project: Path, stage: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run one stage as DVC would, without DVC."""
    return subprocess.run(
        [sys.executable, "-m", "tasks", stage],
        cwd=project,
        env=stage_environment(**more),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def make_project(folder: Path) -> Path:
    """Copy the code as it stands and the head of every data file into `folder`, with the tiny profile's parameters."""
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


@pytest.fixture(scope="session")
def finished_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small project in which every stage has run once without a break. Copy it; do not write to it."""
    project = make_project(tmp_path_factory.mktemp("finished") / "project")
    for stage in (
        "validate", "sft", "generate", "label", "preferences", "reward", "align@ppo", "align@dpo", "evaluate", "report",
    ):  # fmt: skip
        done = run_stage(project, stage)
        assert done.returncode == 0, f"{stage} failed:\n{done.stdout}\n{done.stderr}"
    return project
