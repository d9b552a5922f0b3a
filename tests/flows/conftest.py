"""Small projects with stages that only count, for tests of what runs around stages."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.timing import patience

from benchmarks.scratch import commit_start
from flows.local.servers import known_servers
from flows.local.settings import prefect_settings

ROOT = Path(__file__).parents[2]

PARAMS = """\
seed: 0
compute: {device: cpu}
data: {demonstrations: data/demonstrations.jsonl}
sft: {max_steps: 3}
align: {algorithms: [ppo, dpo]}
"""
DVC = """\
stages:
  first:
    cmd: python counting.py first
    deps: [data, counting.py]
    params: [seed, sft.max_steps]
    outs: [artifacts/first]
    metrics: [reports/metrics/first.json]
  second:
    matrix:
      algorithm: ${align.algorithms}
    cmd: python counting.py second@${item.algorithm}
    deps: [artifacts/first, counting.py]
    params: [sft.max_steps]
    outs: ["artifacts/second/${item.algorithm}"]
    metrics: ["reports/metrics/second-${item.algorithm}.json"]
"""
COUNTING = '''\
"""A stage that counts to `sft.max_steps`, a twentieth of a second a step.

It exits with 4 when the seed is 13; when it is 17 the first two tries of `first` in a worktree exit with 7.
"""

import sys
import time
from pathlib import Path

from rlhf_core.errors import DataError, EnvironmentProblem
from tasks.params import load_params
from tasks.frame.process import run_stage
from tasks.frame.watchdog import end_with_ancestors
import os


def body(stage):
    total = stage.params.sft.max_steps
    print("counting", flush=True)
    for step in range(1, total + 1):
        if stage.params.seed == 13:
            raise DataError("data/x.jsonl:1: prompt: empty. Fix: drop the row")
        if stage.params.seed == 17 and stage.name == "first":
            fail_twice()
        stage.log(step, total, {"loss/train": 1.0 / step}, step * 100)
        time.sleep(0.05)
    (stage.out / "result.txt").write_text(f"{stage.name} counted to {total}")
    return {"steps": total}


def fail_twice():
    tries = Path(".rlhf/tries")
    count = len(tries.read_text()) if tries.exists() else 0
    if count < 2:
        tries.write_text("x" * (count + 1))
        raise EnvironmentProblem(f"try {count + 1}: no memory. Fix: free some")


end_with_ancestors(os.environ)
sys.exit(run_stage(sys.argv[1], body, load_params(Path("params.yaml")), Path.cwd()))
'''


def plain_environment(**more: str) -> dict[str, str]:
    """The environment without anything that points at servers or stores of somebody else."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RLHF_", "PREFECT_", "MLFLOW_"))}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


def on_server(project: Path, code: str, *arguments: str) -> str:
    """What `code` prints that asks the project's Prefect server; it may import from `tests`."""
    settings = prefect_settings(project, known_servers(project)["prefect"].port)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=project,
        env=plain_environment(**settings, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def make_counting_project(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data").mkdir()
    (folder / "data/demonstrations.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    for name, text in {"params.yaml": PARAMS, "dvc.yaml": DVC, "counting.py": COUNTING}.items():
        (folder / name).write_text(text)
    (folder / ".gitignore").write_text("/.rlhf/\n/runs/\n/artifacts/\n/reports/\n__pycache__/\n")
    (folder / ".dvcignore").write_text("/.rlhf/\n/runs/\n__pycache__/\n")
    return commit_start(folder)


def set_steps(project: Path, steps: int) -> None:
    text = (project / "params.yaml").read_text()
    before, _, after = text.partition("max_steps: ")
    (project / "params.yaml").write_text(f"{before}max_steps: {steps}{after[after.index('}') :]}")


def processes_in(folder: Path) -> list[int]:
    """Living stage and DVC processes that work in `folder` or below it, those of its worktrees not counted."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            where = Path(os.readlink(entry / "cwd"))
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
        except OSError:
            continue
        inside = where.is_relative_to(folder) and not where.is_relative_to(folder / "runs")
        if inside and any(name in command for name in (b"counting.py", b" dvc ", b" tasks.frame.lock_file ")):
            found.append(int(entry.name))
    return found


def wait_for(condition: Callable[[], object], timeout_s: float, what: str) -> float:
    """Wait until `condition()` is true, on a busy machine longer; the seconds it took."""
    started = time.monotonic()
    while not condition():
        waited = time.monotonic() - started
        assert waited < patience(timeout_s), f"waited {waited:.1f} s in vain: {what}"
        time.sleep(0.05)
    return time.monotonic() - started


@pytest.fixture(scope="session")
def counting_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_counting_project(tmp_path_factory.mktemp("template") / "project")


@pytest.fixture
def counting_project(tmp_path: Path, counting_template: Path) -> Path:
    """A counting project of the test's own, in a git and DVC repository."""
    return Path(shutil.copytree(counting_template, tmp_path / "project", symlinks=True))


@pytest.fixture(scope="session")
def served_project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A counting project with a Prefect server that all integration tests share."""
    from flows.local.servers import ensure_prefect, stop_servers

    project = make_counting_project(tmp_path_factory.mktemp("served") / "project")
    ensure_prefect(project)
    yield project
    stop_servers(project)
