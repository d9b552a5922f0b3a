import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_core.errors import EnvironmentProblem
from tasks.frame.locks import DVC_LOCKS, OWNER_FILE, RunLock, read_owner

HOLDER = """
import sys, time
from pathlib import Path
from tasks.frame.locks import RunLock
with RunLock(Path(sys.argv[1]), "night run"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_and_told_who_is_first(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(EnvironmentProblem, match=rf"'night run' \(process {holder.pid}, started 20"):
        RunLock(tmp_path, "mine").__enter__()
    owner = read_owner(tmp_path)
    assert owner is not None
    assert (owner.pid, owner.run) == (holder.pid, "night run")


def test_a_killed_owner_holds_nothing(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / OWNER_FILE).exists()
    assert read_owner(tmp_path) is None
    with RunLock(tmp_path, "mine"):
        owner = read_owner(tmp_path)
        assert owner is not None
        assert owner.pid == os.getpid()
    assert not (tmp_path / OWNER_FILE).exists()


@pytest.mark.parametrize("change", [{"boot": "another boot"}, {"process_start": "1"}])
def test_a_pid_that_was_used_again_is_not_believed(tmp_path: Path, change: dict[str, str]) -> None:
    with RunLock(tmp_path, "mine"):
        note = json.loads((tmp_path / OWNER_FILE).read_text())
        assert read_owner(tmp_path) is not None
        (tmp_path / OWNER_FILE).write_text(json.dumps(note | change))
        assert read_owner(tmp_path) is None


def test_a_broken_note_is_no_owner_and_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / OWNER_FILE).parent.mkdir(parents=True)
    (tmp_path / OWNER_FILE).write_text("{half")
    assert read_owner(tmp_path) is None
    with RunLock(tmp_path, "mine"):
        assert read_owner(tmp_path) is not None


def test_the_lock_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunLock(tmp_path, "mine"):
        _ = 1 / 0
    with RunLock(tmp_path, "again"):
        pass


def test_what_killed_dvc_commands_left_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / DVC_LOCKS
    path.parent.mkdir(parents=True)
    dvc = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "dvc"])
    zombie = subprocess.Popen([sys.executable, "-c", "pass", "dvc"])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    try:
        alive, dead = {"pid": dvc.pid, "cmd": "dvc repro"}, {"pid": zombie.pid, "cmd": "dvc repro"}
        stranger = {"pid": 1, "cmd": "dvc repro"}
        noted = {"read": {"a": [alive, dead], "b": [dead]}, "write": {"c": alive, "d": dead, "e": stranger}}
        path.write_text(json.dumps(noted))
        with RunLock(tmp_path, "mine"):
            pass
        assert json.loads(path.read_text()) == {"read": {"a": [alive]}, "write": {"c": alive}}
        path.write_text('{"read": {')
        with RunLock(tmp_path, "mine"):
            pass
        assert not path.exists()
    finally:
        dvc.kill()
        dvc.wait()
        zombie.wait()
