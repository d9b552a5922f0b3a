"""The stage runner on real DVC and real processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.project import processes_of
from support.timing import patience

from tasks.frame.runner import ProgressFollower, Stop, end_group, explain_failure, run_stage_process
from tasks.frame.watchdog import process_start
from tests.flows.conftest import plain_environment, processes_in, set_steps, wait_for

PARENT = """
import sys
from pathlib import Path
from tasks.frame.runner import Stop, run_stage_process
run_stage_process(Path(sys.argv[1]), "first", stop=Stop())
"""


def test_lines_events_and_figures_come_through(counting_project: Path) -> None:
    lines: list[str] = []
    events: list[dict] = []
    result = run_stage_process(
        counting_project, "first", stop=Stop(), on_line=lines.append, on_event=lambda event: events.append(dict(event))
    )
    assert (result.exit_code, result.ran, result.message) == (0, True, "")
    assert "counting" in lines
    assert [event["event"] for event in events] == ["start", "progress", "progress", "progress", "done"]
    assert result.tokens == 300
    assert result.compute_s is not None
    assert 0.1 < result.compute_s < result.wall_s
    assert (counting_project / "artifacts/first/result.txt").read_text() == "first counted to 3"
    again = run_stage_process(counting_project, "first", stop=Stop())
    assert (again.exit_code, again.ran, again.compute_s) == (0, False, None)


def test_the_stages_own_exit_code_and_message_are_kept(counting_project: Path) -> None:
    text = (counting_project / "params.yaml").read_text().replace("seed: 0", "seed: 13")
    (counting_project / "params.yaml").write_text(text)
    result = run_stage_process(counting_project, "first", stop=Stop())
    assert result.exit_code == 4
    assert result.message == "data/x.jsonl:1: prompt: empty. Fix: drop the row"
    assert not (counting_project / "artifacts/first").exists()


def test_an_unknown_stage_is_explained(counting_project: Path) -> None:
    result = run_stage_process(counting_project, "third", stop=Stop())
    assert result.exit_code == 1
    assert "third" in result.message


@pytest.mark.parametrize(("reason", "code"), [("cancelled", 143), ("SIGINT", 130)])
def test_stopping_ends_the_whole_group_in_time(counting_project: Path, reason: str, code: int) -> None:
    set_steps(counting_project, 2000)
    stop = Stop()
    asked = []

    def on_event(event) -> None:
        if event["event"] == "progress" and not asked:
            asked.append(time.monotonic())
            assert processes_in(counting_project)
            stop.request(reason)

    result = run_stage_process(counting_project, "first", stop=stop, on_event=on_event)
    assert time.monotonic() - asked[0] < patience(5)
    assert result.exit_code == code
    assert processes_in(counting_project) == []
    assert not (counting_project / "artifacts/first").exists()


def test_a_time_out_ends_the_group(counting_project: Path) -> None:
    set_steps(counting_project, 2000)
    result = run_stage_process(counting_project, "first", stop=Stop(), timeout_s=2.0)
    assert (result.exit_code, processes_in(counting_project)) == (7, [])
    assert "timeout" in result.message


def test_an_error_in_a_callback_ends_the_group(counting_project: Path) -> None:
    set_steps(counting_project, 2000)

    def broken(event) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_stage_process(counting_project, "first", stop=Stop(), on_event=broken)
    assert processes_in(counting_project) == []


def test_no_process_outlives_a_killed_parent(counting_project: Path) -> None:
    set_steps(counting_project, 2000)
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(counting_project)], env=plain_environment())
    stream = counting_project / ".rlhf/progress/first.jsonl"
    wait_for(lambda: stream.exists() and '"progress"' in stream.read_text(), 30, "the stage counts")
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    wait_for(lambda: not processes_in(counting_project), 3, "the stage ends with its parent")
    size = stream.stat().st_size
    time.sleep(0.3)
    assert stream.stat().st_size == size


LAUNCHER = """
import os, subprocess, sys
command = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
child = subprocess.Popen([sys.executable, "-m", "tasks.launch", str(os.getpid()), *command], start_new_session=True)
print(child.pid, flush=True)
child.wait()
"""


def test_the_kernel_ends_a_launched_command_with_its_parent() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, text=True, env=plain_environment()
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert parent.stdout.readline() == "up\n"
    assert process_start(pid)
    parent.kill()
    parent.wait()
    wait_for(lambda: process_start(pid) is None, 2, "the command dies though nothing watches it")


def test_a_command_whose_parent_is_gone_already_is_not_started() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tasks.launch", "1", sys.executable, "-c", "print('up')"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")


ORPHAN = """
import os, subprocess, sys
# DVC as it starts a command by a shell, in little; it dies before the command looks around
watch = "from tasks.frame.watchdog import end_with_ancestors; end_with_ancestors(os.environ)"
code = f"import os, time; time.sleep(1); {watch}; print('lives', flush=True); time.sleep(600)"
subprocess.Popen(["/bin/sh", "-c", f'{sys.executable} -c "{code}"; true'], env={**os.environ, "DVC_STAGE": "sft"})
os._exit(0)
"""


def test_a_stage_whose_dvc_died_before_it_looked_around_does_not_begin(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with out.open("wb") as file:
        subprocess.run([sys.executable, "-c", ORPHAN], stdout=file, env=plain_environment(), cwd=tmp_path, check=True)
    wait_for(lambda: not processes_of(tmp_path), 10, "shell and command are gone")
    assert out.read_text() == ""


def test_a_stage_whose_dvc_lives_does(tmp_path: Path) -> None:
    living = ORPHAN.replace("os._exit(0)", "import time; time.sleep(600)")
    with subprocess.Popen(
        [sys.executable, "-c", living], stdout=subprocess.PIPE, text=True, env=plain_environment(), cwd=tmp_path
    ) as dvc:
        assert dvc.stdout is not None
        assert dvc.stdout.readline() == "lives\n"
        dvc.kill()
        wait_for(lambda: not processes_of(tmp_path), 1, "shell and command end with it")


def test_one_of_several_processes_whose_launcher_is_gone_does_not_begin() -> None:
    code = "import os; from tasks.frame import watchdog; watchdog.end_with_ancestors(os.environ); print('lives')"
    gone = {"RLHF_LAUNCHED": "999999999:1", "RANK": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=plain_environment(**gone), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")


def test_what_ignores_sigterm_is_killed() -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    started = time.monotonic()
    end_group(process, grace_s=0.3)
    assert process.returncode == -signal.SIGKILL
    assert 0.3 <= time.monotonic() - started < patience(2)


def test_a_run_that_was_told_to_end_before_ends_at_once(counting_project: Path) -> None:
    stop = Stop()
    stop.request("SIGTERM")
    result = run_stage_process(counting_project, "first", stop=stop)
    assert result.exit_code == 143
    assert processes_in(counting_project) == []


def test_only_the_first_reason_counts() -> None:
    stop = Stop()
    threads = [threading.Thread(target=stop.request, args=("SIGINT",)) for _ in range(3)]
    for thread in threads:
        thread.start()
        thread.join()
    stop.request("timeout")
    assert (stop.requested, stop.reason, stop.exit_code) == (True, "SIGINT", 130)


def test_a_half_written_event_waits(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    follower = ProgressFollower(path)
    assert follower.read() == []
    with path.open("w") as file:
        file.write('{"event": "start", "pid": 1}\n{"event": "pro')
        file.flush()
        assert [event["event"] for event in follower.read()] == ["start"]
        file.write('gress", "step": 1}\n')
        file.flush()
        assert [event["event"] for event in follower.read()] == ["progress"]
    follower.close()
    assert set(follower.seen) == {"start", "progress"}


@pytest.mark.parametrize(
    ("line", "code", "part"),
    [
        ("ERROR: failed to reproduce 'sft': failed to run: python -m tasks sft, exited with -9", 7, "memory"),
        ("ERROR: failed to reproduce 'sft': failed to run: python -m tasks sft, exited with 2", 2, "exited with 2"),
        ("ERROR: Unable to acquire lock. Most likely another DVC process is running", 7, "another dvc command"),
        ("ERROR: something else", 1, "something else"),
    ],
)
def test_failures_that_the_stage_could_not_write_down(line: str, code: int, part: str) -> None:
    found, message = explain_failure("sft", 1, ["Running stage 'sft':", line])
    assert found == code
    assert part in message


def test_dvc_itself_killed_is_said_to_be() -> None:
    found, message = explain_failure("sft", -signal.SIGKILL, ["step 1/24"])
    assert found == 7
    assert "killed from outside" in message
