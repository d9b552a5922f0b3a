"""A small project of its own, in a git and DVC repository, for benchmarks that run the pipeline as people do."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from rlhf_core.state.atomic import tree_digest
from tasks.params import resolve_params

ROOT = Path(__file__).parents[1]
COPIED = ("rlhf_core", "tasks", "flows", "mlflow", "models/none", "profiles")
FILES = ("dvc.yaml", "params.yaml", "pyproject.toml", "constraints.txt", ".gitignore", ".dvcignore")
LINES = {"demonstrations": 400, "prompts": 70, "heldout_prompts": 60, "graded": 100, "votes": 100}
PUBLISHED = ("artifacts", "reports/metrics", "reports/plots", "reports/html")
PROFILE = ROOT / "profiles/tiny.yaml"


def environment(folder: Path) -> dict[str, str]:
    """Environment of commands in the project: its own code, nobody's servers."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RLHF_", "PREFECT_", "MLFLOW_"))}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**kept, "PYTHONPATH": str(folder), "PATH": path, "DVC_NO_ANALYTICS": "1"}


def make(folder: Path, profile: Path | None = PROFILE, lines: dict[str, int] | None = None) -> Path:
    """Make the project in `folder`, which is not there yet: the code as it stands, a profile, the head of the data.

    Args:
        profile: laid over `params.yaml`; None leaves the demo's settings.
        lines: how many of each data file are kept; None keeps all.
    """
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    (folder / "params.yaml").write_text(resolve_params(ROOT / "params.yaml", profile, []))
    (folder / "data").mkdir()
    for name in LINES:
        rows = (ROOT / f"data/{name}.jsonl").read_text().split("\n")
        kept = rows[: lines[name]] if lines else rows
        (folder / f"data/{name}.jsonl").write_text("\n".join(kept).rstrip("\n") + "\n")
    ignored = (folder / ".gitignore").read_text().split("\n")
    (folder / ".gitignore").write_text("\n".join(line for line in ignored if line != "/data"))
    return commit_start(folder)


def commit_start(folder: Path) -> Path:
    """Begin a git and DVC repository in `folder`: its data in DVC, all else in a first commit."""
    dvc = (sys.executable, "-m", "dvc")
    for command in (
        ("git", "init", "-q", "-b", "main"),
        ("git", "config", "user.email", "somebody@example.org"),
        ("git", "config", "user.name", "Somebody"),
        (*dvc, "init", "-q"),
        (*dvc, "config", "core.analytics", "false"),
        (*dvc, "add", "-q", "data"),
        ("git", "add", "-A"),
        ("git", "commit", "-q", "-m", "start"),
    ):
        subprocess.run(command, cwd=folder, env=environment(folder), check=True, capture_output=True)
    return folder


def published(folder: Path) -> dict[str, str]:
    """Digest of every file that stages publish."""
    found = {}
    for name in PUBLISHED:
        if (folder / name).is_dir():
            found |= {f"{name}/{file}": value for file, value in tree_digest(folder / name).items()}
    return found


def forget(folder: Path) -> None:
    """Make every stage unrun: no outputs, no lock, nothing in the cache to restore them from."""
    for name in (*PUBLISHED, ".rlhf/checkpoints", ".rlhf/staging", ".dvc/cache/runs"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("dvc.lock", "reports/headline.json"):
        (folder / name).unlink(missing_ok=True)
