"""One run in a checkout at a time: a lock that the kernel releases with its owner, and a note of who that is."""

import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from rlhf_core.errors import EnvironmentProblem
from rlhf_core.state.atomic import write_json
from tasks import paths
from tasks.frame.watchdog import process_start

LOCK_FILE = paths.LOCKS / "run.lock"
OWNER_FILE = paths.LOCKS / "run.json"
DVC_LOCKS = Path(".dvc/tmp/rwlock")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Owner(BaseModel):
    """Who runs, or ran, in a checkout.

    Attributes:
        pid: process id.
        process_start: the kernel's start time of that process; with `boot` it names a process for good.
        boot: id of the machine's boot; empty where the kernel has none.
        started: seconds since 1970.
        run: name of the run.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    pid: int
    process_start: str
    boot: str
    started: float
    run: str

    def alive(self) -> bool:
        """Whether exactly this process still runs."""
        return self.boot == boot_id() and process_start(self.pid) == self.process_start

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"run {self.run!r} (process {self.pid}, started {since})"


def boot_id() -> str:
    """Id of the machine's present boot, empty where the kernel has none."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""


def read_owner(root: Path) -> Owner | None:
    """Return the living owner of a checkout's run lock; a note left by a process that is gone counts as none.

    Takes no lock itself, so asking never makes a starting run fail.
    """
    owner = _noted_owner(root)
    return owner if owner and owner.alive() else None


def _noted_owner(root: Path) -> Owner | None:
    try:
        return Owner.model_validate(json.loads((root / OWNER_FILE).read_text()))
    except (OSError, ValueError, ValidationError):
        return None


def forget_dead_dvc(root: Path) -> None:
    """Drop what killed dvc commands left in DVC's own note of who works on which file.

    DVC believes such an entry for as long as any process has its pid: one that was killed and is not yet waited for,
    or a stranger who was given the pid later. A run that was killed could then not be gone on with.
    """
    path = root / DVC_LOCKS
    try:
        noted = json.loads(path.read_text())
        read = {
            file: kept for file, owners in noted["read"].items() if (kept := [one for one in owners if _dvc_runs(one)])
        }
        write = {file: owner for file, owner in noted["write"].items() if _dvc_runs(owner)}
    except FileNotFoundError:
        return
    except (ValueError, KeyError, AttributeError, TypeError):  # cut off by a kill: whoever wrote it is gone
        path.unlink(missing_ok=True)
        return
    if {"read": read, "write": write} != noted:
        write_json(path, {"read": read, "write": write})


def _dvc_runs(owner: Mapping[str, Any]) -> bool:
    pid = int(owner["pid"])
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return process_start(pid) is not None and any(
        word in command for word in (b"dvc", b"tasks.frame.lock_file", b"tasks.frame.forkserver")
    )


class RunLock:
    """Holds a checkout for one run; a context manager.

    The lock is the kernel's (`flock`), so it goes with the process however that ends; the note beside it only tells
    people and `rlhf status` who holds it.

    Raises:
        EnvironmentProblem: on entering, when another run holds it; the message names that run.
    """

    def __init__(self, root: Path, run: str) -> None:
        self._root, self._run = root, run
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        path = self._root / LOCK_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            owner = _noted_owner(self._root) or "another run that has not said its name yet"
            raise EnvironmentProblem(
                f"{self._root}: {owner} is at work here. Fix: wait for it (rlhf status), end it, "
                "or give this run a worktree of its own with --name"
            ) from None
        self._descriptor = descriptor
        forget_dead_dvc(self._root)
        pid = os.getpid()
        owner = Owner(
            pid=pid, process_start=process_start(pid) or "", boot=boot_id(), started=time.time(), run=self._run
        )
        write_json(self._root / OWNER_FILE, owner.model_dump())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            (self._root / OWNER_FILE).unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None
