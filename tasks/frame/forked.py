"""Asking a fork server (`tasks/frame/forkserver.py`) for stages: from the side of the process that runs them."""

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tasks import paths
from tasks.frame.forkserver import LENGTH_BYTES
from tasks.launch import tied

LOG = paths.STATE / "forkserver.log"
SERVER = Path("tasks/frame/forkserver.py")
POLL_SECONDS = 0.1
COMMAND = "python3 -m tasks {}"  # of a stage, as `dvc.yaml` has it


class ForkedProcess:
    """A process that a fork server made; answers what a `subprocess.Popen` answers.

    Attributes:
        pid: leader of its session and process group.
        stdout: what it and its children print.
        returncode: None while it runs; negative for a signal. Minus nine where it was killed.
    """

    def __init__(self, pid: int, answer: socket.socket, output: int) -> None:
        self.pid = pid
        self.stdout = os.fdopen(output, encoding="utf-8", errors="replace")
        self.returncode: int | None = None
        self._answer = answer

    def poll(self) -> int | None:
        """The return code, or None while it runs."""
        return self.wait(0.0)

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the end, at most `timeout` seconds; the return code, or None while it runs."""
        if self.returncode is None and select.select([self._answer], [], [], timeout)[0]:
            word = _word(self._answer)
            self.returncode = word["code"] if word else -9
            self._answer.recv(1)  # its end is that of the process
            self._answer.close()
        return self.returncode


class Forks:
    """A fork server for the stages of one checkout or worktree, with the code that lies there; a context manager.

    Args:
        root: the checkout; the server's working folder.
        stages: what is likely to be asked for, in this order.
        environment: of the server, of DVC and of the stages.
    """

    def __init__(self, root: Path, stages: Iterable[str], environment: Mapping[str, str]) -> None:
        self._requests, theirs = socket.socketpair()
        self._asking = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        (root / LOG).parent.mkdir(parents=True, exist_ok=True)
        if not (root / SERVER).is_file():  # an installed checkout would lend its own, to code of another commit
            (root / LOG).write_text(f"No module named {SERVER.as_posix()} in this commit: stages start afresh\n")
            theirs.close()
            return
        modules = dict.fromkeys(_module(stage) for stage in stages)
        command = [sys.executable, "-m", "tasks.frame.forkserver", str(theirs.fileno()), *modules]
        started = threading.Event()

        def run() -> None:  # the kernel would take the end of a shorter-lived thread for this process's
            with theirs, (root / LOG).open("wb") as log, contextlib.suppress(OSError):
                self._process = subprocess.Popen(
                    tied(command),
                    cwd=root,
                    env=dict(environment),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(theirs.fileno(),),
                )
                theirs.close()
                started.set()
                self._process.wait()
            started.set()

        self._thread = threading.Thread(target=run, name="fork-server", daemon=True)
        self._thread.start()
        started.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the server, even in the middle of an import; what it forked ends with it."""
        self._requests.close()
        if self._process is not None:
            self._process.kill()
        if self._thread is not None:
            self._thread.join(timeout=5.0)

    def start(
        self, stage: str, dvc: Sequence[str], *, given_up: Callable[[], bool] = lambda: False
    ) -> ForkedProcess | None:
        """Start `dvc` with these arguments for one stage; None where the server cannot, and a fresh process must.

        Waits while the server still imports, unless `given_up` says so.
        """
        read, write = os.pipe()
        answer, theirs = socket.socketpair()
        request = {"dvc": list(dvc), "command": COMMAND.format(stage)}
        payload = json.dumps(request | {"modules": ["tasks.__main__", "tasks.frame.process", _module(stage)]}).encode()
        word = None
        with contextlib.suppress(OSError), self._asking:  # a broken pipe: the server is gone
            socket.send_fds(self._requests, [len(payload).to_bytes(LENGTH_BYTES, "big")], [write, theirs.fileno()])
            self._requests.sendall(payload)
        os.close(write)
        theirs.close()
        while not given_up():
            if select.select([answer], [], [], POLL_SECONDS)[0]:
                word = _word(answer)
                break
        if word is None or "pid" not in word:
            answer.close()
            os.close(read)
            return None
        return ForkedProcess(word["pid"], answer, read)


def _module(stage: str) -> str:
    return f"tasks.stages.{stage.partition('@')[0]}.run"


def _word(answer: socket.socket) -> dict[str, Any] | None:
    """The next line of an answer; None at its end."""
    line = b""
    while not line.endswith(b"\n"):
        try:
            more = answer.recv(1)
        except OSError:
            more = b""
        if not more:
            return None
        line += more
    found: dict[str, Any] = json.loads(line)
    return found
