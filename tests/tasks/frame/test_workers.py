"""Jobs side by side: their results, their errors, and that none outlives who asked for them."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from support.timing import patience

from rlhf_core.errors import DataError, EnvironmentProblem
from tasks.frame.watchdog import process_start
from tasks.frame.workers import Tell, in_turn, side_by_side


def nothing(word: object) -> None:
    pass


def say(word: str, tell: Tell) -> str:
    tell(word)
    return f"{word} from {os.getpid()}"


def test_results_come_in_order_from_processes_of_their_own() -> None:
    told: list[str] = []
    found = side_by_side({name: partial(say, name) for name in "cab"}, told.append, at_most=2)
    assert list(found) == ["c", "a", "b"]
    assert sorted(told) == ["a", "b", "c"]
    assert [text.split()[0] for text in found.values()] == ["c", "a", "b"]
    assert len({*found.values(), f"x from {os.getpid()}"}) == 4
    assert {name: text.split()[0] for name, text in found.items()} == {
        name: text.split()[0] for name, text in in_turn({name: partial(say, name) for name in "cab"}, nothing).items()
    }


def count(folder: Path, name: str, tell: Tell) -> int:
    """The largest number of jobs that were at work while this one was."""
    (folder / name).touch()
    most = 0
    for _ in range(20):
        most = max(most, len(list(folder.iterdir())))
        time.sleep(0.01)
    (folder / name).unlink()
    return most


@pytest.mark.parametrize("at_most", [1, 2])
def test_no_more_work_at_a_time_than_were_allowed(tmp_path: Path, at_most: int) -> None:
    found = side_by_side({name: partial(count, tmp_path, name) for name in "abcd"}, nothing, at_most=at_most)
    assert max(found.values()) == at_most


def fail(tell: Tell) -> None:
    raise DataError("data/x.jsonl:1: empty. Fix: drop the row")


def sleep(pids: Path, tell: Tell) -> None:
    pids.write_text(str(os.getpid()))
    time.sleep(600)


def kill(tell: Tell) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail_late(pids: Path, how, tell: Tell) -> None:
    while not pids.exists() or not pids.read_text():
        time.sleep(0.01)
    how(tell)


@pytest.mark.parametrize(("how", "kind"), [(fail, DataError), (kill, EnvironmentProblem)])
def test_a_failure_comes_through_and_ends_the_others(tmp_path: Path, how, kind: type[Exception]) -> None:
    pids = tmp_path / "pid"
    jobs = {"sleeps": partial(sleep, pids), "fails": partial(fail_late, pids, how)}
    with pytest.raises(kind, match=r"Fix:") as caught:
        side_by_side(jobs, nothing, at_most=2)
    assert process_start(int(pids.read_text())) is None
    if kind is EnvironmentProblem:
        assert "fails" in str(caught.value)


def tell_on(tell: Tell) -> None:
    while True:
        tell("on")


def test_a_failure_is_the_only_thing_that_is_said(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither who waits for its turn nor who is telling something has time to be surprised that nobody listens."""
    kill_now = os.kill

    def kill_late(pid: int, number: int) -> None:
        time.sleep(0.2)
        kill_now(pid, number)

    monkeypatch.setattr(os, "kill", kill_late)
    with pytest.raises(DataError):
        side_by_side({"tells": tell_on, "fails": fail, "waits": fail}, nothing, at_most=2)
    assert capfd.readouterr().err == ""


def test_a_bug_in_a_job_is_named() -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        side_by_side({"one": lambda tell: 1 // 0}, nothing, at_most=2)


PARENT = """
import os, sys, time
from pathlib import Path
from tasks.frame.workers import side_by_side
def job(tell):
    Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(600)
side_by_side({"a": job, "b": job, "c": job}, print, at_most=2)
"""


def test_they_die_with_the_process_that_asked(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)])
    deadline = time.monotonic() + patience(20)
    while len(found := list(tmp_path.iterdir())) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + patience(1)
    while any(process_start(int(path.name)) for path in found):
        assert time.monotonic() < deadline
        time.sleep(0.02)
