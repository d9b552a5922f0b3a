"""`rlhf clean`: the rule, on a real project with git and DVC."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from flows.run.cleaning import clean, clean_cache, leftovers
from flows.run.summary import LIVE_FILE, RunSummary, StageSummary, read_summary, write_live
from rlhf_core.errors import EnvironmentProblem
from tasks import paths
from tasks.frame.locks import RunLock
from tasks.lineage.versioning import create_run_worktree, restore_data
from tests.flows.conftest import plain_environment


def run_of(home: Path, name: str, status: str, started: float) -> Path:
    root = create_run_worktree(home, name, (home / "params.yaml").read_text(), {})
    stages = [StageSummary(name="first", status="done")]
    write_live(root, RunSummary(run=name, run_key=name, status=status, started=started, stages=stages))
    return root


def gone(home: Path, **options) -> list[str]:
    found = leftovers(home, **options)
    return sorted(entry.path.relative_to(home).as_posix() for entry in found)


def test_finished_runs_go_but_for_the_newest(counting_project: Path) -> None:
    for place, name in enumerate(("one", "two", "three")):
        run_of(counting_project, name, "done", float(place))
    run_of(counting_project, "broken", "failed", 0.5)
    assert gone(counting_project, keep=2) == ["runs/one"]
    assert gone(counting_project, keep=0) == ["runs/one", "runs/three", "runs/two"]
    assert gone(counting_project, keep=2, unfinished=True) == ["runs/broken", "runs/one"]
    with RunLock(counting_project / "runs/one", "one"):
        assert gone(counting_project, keep=2) == []
    clean(counting_project, leftovers(counting_project, keep=1))
    left = sorted(path.name for path in (counting_project / "runs").iterdir())
    assert left == ["broken", "three"]
    listed = subprocess.run(
        ["git", "worktree", "list"], cwd=counting_project, capture_output=True, text=True, check=True
    ).stdout
    assert "runs/two" not in listed
    assert "runs/three" in listed


def test_a_run_that_starts_in_the_meantime_stays(counting_project: Path) -> None:
    """And neither keeps the others from going nor is said to be gone."""
    root = run_of(counting_project, "one", "done", 1.0)
    other = run_of(counting_project, "two", "done", 0.5)
    found = leftovers(counting_project, keep=0)
    assert {entry.path for entry in found} == {root, other}
    with RunLock(root, "one"):
        assert [entry.path for entry in clean(counting_project, found)] == [other]
    assert root.exists()
    assert not other.exists()


def test_a_run_in_part_can_be_gone_on_with_and_stays(counting_project: Path) -> None:
    root = run_of(counting_project, "one", "done", 1.0)
    summary = read_summary(root / LIVE_FILE)
    left_out = summary.stages[0].model_copy(update={"name": "second@ppo", "status": "left out"})
    write_live(root, summary.model_copy(update={"stages": [*summary.stages, left_out]}))
    assert gone(counting_project, keep=0) == []
    (found,) = leftovers(counting_project, keep=0, unfinished=True)
    assert (found.path, found.why) == (root, "unfinished (done in part)")


def test_what_a_process_at_work_is_making_is_no_leftover(counting_project: Path) -> None:
    staging = counting_project / paths.STAGING
    mine, dead = staging / f".tmp-model-{os.getpid()}-ab12cd34", staging / ".tmp-model-99999999-ab12cd34"
    for folder in (mine, dead):
        folder.mkdir(parents=True)
    assert gone(counting_project, keep=0) == [dead.relative_to(counting_project).as_posix()]


def test_what_a_stage_holds_is_not_said_to_be_removed(counting_project: Path) -> None:
    cache = counting_project / paths.REFERENCE_CACHE
    cache.mkdir(parents=True)
    found = leftovers(counting_project, keep=0)
    assert [entry.path for entry in found] == [cache]
    lock = counting_project / paths.LOCKS / "align-dpo.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        assert clean(counting_project, found) == []
    assert cache.exists()
    assert clean(counting_project, found) == found


def test_checkpoints_go_where_the_stage_is_up_to_date(counting_project: Path) -> None:
    def leave_checkpoints() -> None:
        for name in ("first", "second-ppo"):
            folder = counting_project / paths.CHECKPOINTS / name / "abc"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "weights").write_bytes(b"x" * 1000)

    leave_checkpoints()
    assert gone(counting_project, keep=5) == [], "nothing has run: both may be gone on with"
    # the stage's command is `python`, which is to be this one wherever the tests are started
    environment = plain_environment(PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    command = [sys.executable, "-m", "dvc", "repro", "-q", "first"]
    subprocess.run(command, cwd=counting_project, env=environment, check=True)
    leave_checkpoints()  # a stage that ends takes its own away; these are of other settings
    (found,) = leftovers(counting_project, keep=5)
    assert (found.path.name, found.size) == ("first", 1000)
    clean(counting_project, [found])
    assert not found.path.exists()
    assert (counting_project / paths.CHECKPOINTS / "second-ppo").exists()


def test_the_cache_keeps_the_data_of_registered_versions(counting_project: Path) -> None:
    home = counting_project

    def add(text: str) -> str:
        (home / "data/demonstrations.jsonl").write_text(text)
        subprocess.run([sys.executable, "-m", "dvc", "add", "-q", "data"], cwd=home, check=True)
        return (home / "data.dvc").read_text()

    of_a_version, of_nothing, present = (add(json.dumps({"prompt": n, "response": n}) + "\n") for n in ("a", "b", "c"))
    said = clean_cache(home, [of_a_version])
    assert "Removed" in said or "removed" in said, said
    for text in (present, of_a_version):
        (home / "data.dvc").write_text(text)
        restore_data(home)
    (home / "data.dvc").write_text(of_nothing)
    with pytest.raises(EnvironmentProblem):
        restore_data(home)


def test_the_cache_is_left_alone_while_a_run_is_at_work(counting_project: Path) -> None:
    with RunLock(counting_project, "night"), pytest.raises(EnvironmentProblem, match="'night'"):
        clean_cache(counting_project, [])
