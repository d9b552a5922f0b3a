"""One stage in a process group of its own, by way of DVC: streamed, followed, and ended as a whole.

DVC and the stage are forked from a process that has imported what they need (`tasks/frame/forked.py`), or start afresh.
`dvc repro` leaves its child running when it is killed, and an orchestrator's cancel does not reach a plain child. So
the group is ended from here whatever happens, the kernel ends DVC when this process dies, and the stage's own watchdog
(`tasks/frame/watchdog.py`) sees both.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tasks import paths
from tasks.frame.forked import ForkedProcess, Forks
from tasks.frame.lock_file import dvc_command
from tasks.frame.watchdog import named
from tasks.launch import tied

Event = Mapping[str, Any]
GRACE_SECONDS = 3.0
POLL_SECONDS = 0.1
INTERRUPTED_EXIT = {"SIGINT": 130, "SIGTERM": 143, "cancelled": 143, "timeout": 7}
LAST_LINES = 40
PROC = Path("/proc")


class Stop:
    """Tells everyone in a run that it is to end, and why; set once, from any thread or signal handler."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.reason = ""

    def request(self, reason: str) -> None:
        """Ask for the end; `reason` is a key of `INTERRUPTED_EXIT`. Only the first reason counts."""
        if not self._event.is_set():
            self.reason = reason
            self._event.set()

    @property
    def requested(self) -> bool:
        """Whether the run is to end."""
        return self._event.is_set()

    def wait(self) -> None:
        """Wait until the run is to end."""
        self._event.wait()

    @property
    def exit_code(self) -> int:
        """Exit code that the reason stands for."""
        return INTERRUPTED_EXIT[self.reason]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageResult:
    """How a stage's process went.

    Attributes:
        stage: its name.
        exit_code: of the stage itself, as documented; 130 or 143 when it was ended from here.
        ran: False when DVC found it unchanged or restored its outputs.
        wall_s: seconds from start to end, DVC included.
        computed_from: when the stage's own work began, seconds since 1970; None when it did not get to its end.
        compute_s: seconds of that work; None when it did not get to its end.
        peak_memory_mb: largest resident size of the stage process.
        tokens: tokens it worked through.
        message: one line that says what went wrong; empty when nothing did.
    """

    stage: str
    exit_code: int
    ran: bool
    wall_s: float
    computed_from: float | None = None
    compute_s: float | None = None
    peak_memory_mb: float | None = None
    tokens: int | None = None
    message: str = ""


def run_stage_process(
    root: Path,
    stage: str,
    *,
    stop: Stop,
    on_line: Callable[[str], None] = lambda line: None,
    on_event: Callable[[Event], None] = lambda event: None,
    timeout_s: float | None = None,
    options: Sequence[str] = (),
    forks: Forks | None = None,
) -> StageResult:
    """Bring one stage up to date with `dvc repro --single-item` and return how it went.

    Args:
        root: checkout or worktree; DVC's working directory.
        stage: a stage of `dvc.yaml`.
        stop: ends the stage's whole process group when requested.
        on_line: gets each line that DVC or the stage prints.
        on_event: gets each event of the stage's progress stream.
        timeout_s: ends the group after this long; None waits for ever.
        options: further options of `dvc repro`.
        forks: forks the processes, which then start at once; None, or one that cannot, has them start afresh.

    Whatever ends this function, an exception included, no process of the group is left.
    """
    started = time.monotonic()
    progress = root / paths.progress_file(stage)
    progress.unlink(missing_ok=True)
    process = _start(root, stage, options, forks, stop)
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    reader = threading.Thread(target=_read_lines, args=(process.stdout, lines), daemon=True)
    reader.start()
    follower = ProgressFollower(progress)
    last_lines: list[str] = []

    def drain() -> None:
        while not lines.empty():
            line = lines.get()
            last_lines.append(line)
            del last_lines[:-LAST_LINES]
            on_line(line)
        for event in follower.read():
            on_event(event)

    try:
        while process.poll() is None:
            drain()
            if timeout_s is not None and time.monotonic() - started > timeout_s:
                stop.request("timeout")
            if stop.requested:
                break
            _wait(process, POLL_SECONDS)
    finally:
        end_group(process)
    reader.join(timeout=1.0)
    drain()
    follower.close()
    return _result(stage, process.returncode, follower.seen, last_lines, time.monotonic() - started, stop)


def stage_environment() -> dict[str, str]:
    """Environment of DVC and of the stage that it runs."""
    return os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
        "SHELL": "/bin/sh",  # DVC runs the command in the user's own shell, which may be any
        "DVC_NO_ANALYTICS": "1",
        "RLHF_SUPERVISOR": named(os.getpid()),
    }


def start_forks(root: Path, stages: Iterable[str]) -> Forks:
    """A fork server for the stages of a checkout; to be started early, since it takes seconds to import."""
    return Forks(root, stages, stage_environment())


def _start(
    root: Path, stage: str, options: Sequence[str], forks: Forks | None, stop: Stop
) -> "subprocess.Popen[str] | ForkedProcess":
    # stages that run side by side hold DVC's lock for moments only, and must wait for each other then
    dvc = ["--wait-for-lock", "repro", "--single-item", *options, stage]
    forked = forks.start(stage, dvc, given_up=lambda: stop.requested) if forks else None
    if forked is not None:
        return forked
    return subprocess.Popen(
        tied([*dvc_command(root), *dvc]),
        cwd=root,
        env=stage_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def _read_lines(output: Iterable[str], lines: "queue.SimpleQueue[str]") -> None:
    for line in output:
        lines.put(line.rstrip("\n"))


class ProgressFollower:
    """Reads a progress stream while it is written; keeps the first and the last event of each kind."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None
        self._rest = ""
        self.seen: dict[str, Event] = {}

    def read(self) -> list[Event]:
        """Return the events that came since the last call; a half-written line waits."""
        if self._file is None:
            try:
                self._file = self._path.open(encoding="utf-8")
            except FileNotFoundError:
                return []
        *whole, self._rest = (self._rest + self._file.read()).split("\n")
        events = [json.loads(line) for line in whole if line]
        self.seen |= {event["event"]: event for event in events}
        return events

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _result(
    stage: str, return_code: int | None, seen: Mapping[str, Event], last_lines: list[str], wall_s: float, stop: Stop
) -> StageResult:
    done, failed = seen.get("done"), seen.get("failed")
    exit_code, message = 0, ""
    if return_code != 0:
        if stop.requested:
            exit_code, message = stop.exit_code, f"{stage}: ended ({stop.reason})"
        elif failed:
            exit_code, message = int(failed["exit_code"]), str(failed["message"])
        else:
            exit_code, message = explain_failure(stage, return_code, last_lines)
    return StageResult(
        stage=stage,
        exit_code=exit_code,
        ran="start" in seen,
        wall_s=wall_s,
        computed_from=seen["start"]["time"] if done else None,
        compute_s=done["compute_s"] if done else None,
        peak_memory_mb=done["peak_memory_mb"] if done else None,
        tokens=done["tokens"] if done else None,
        message=message,
    )


def explain_failure(stage: str, return_code: int | None, last_lines: list[str]) -> tuple[int, str]:
    """Exit code and message of a failure that the stage itself could not write down."""
    errors = [line for line in last_lines if line.startswith("ERROR:")]
    text = (errors or last_lines or ["no output"])[-1].removeprefix("ERROR:").strip()
    if return_code == -signal.SIGKILL or "exited with -9" in text or "exited with 137" in text:
        return 7, f"{stage}: killed from outside, perhaps for want of memory. Fix: free memory, then rlhf resume"
    if any("acquire lock" in line.lower() or "rwlock" in line.lower() for line in last_lines):
        return 7, f"{stage}: another dvc command holds the lock ({text}). Fix: wait for it, then rlhf resume"
    code = text.rpartition("exited with ")[2]
    return (int(code) if code in {"2", "3", "4", "5", "6", "7"} else 1), f"{stage}: {text}"


def group_members(group: int) -> list[int]:
    """Pids of the living processes of a process group; a zombie lives no more."""
    members = []
    for entry in PROC.iterdir() if PROC.exists() else ():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == group and fields[0] not in "ZX":
                members.append(int(entry.name))
    return members


def _wait(process: "subprocess.Popen[Any] | ForkedProcess", seconds: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def end_group(process: "subprocess.Popen[Any] | ForkedProcess", grace_s: float = GRACE_SECONDS) -> None:
    """End every process of the group that `process` leads: SIGTERM, a grace, SIGKILL. Nothing to end is fine."""

    def left() -> bool:
        return process.poll() is None or bool(group_members(process.pid))

    for number in (signal.SIGTERM, signal.SIGKILL):
        if not left():
            break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        deadline = time.monotonic() + grace_s
        while left() and time.monotonic() < deadline:
            time.sleep(0.02)
    process.wait()
