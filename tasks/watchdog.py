"""A stage never outlives whoever started it: an orphan would go on writing while the next run starts."""

import os
import signal
import socket
import threading
import time
from pathlib import Path

SHELLS = ("sh", "dash", "bash", "zsh")
POLL_SECONDS = 0.5


def process_start(pid: int) -> str | None:
    """Kernel start time of a process in clock ticks, or None where it no longer runs.

    Together with the pid it names a process for good, since pids are used again.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def _parent(pid: int) -> int:
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[1])


def _watched(supervisor: str | None) -> dict[int, str]:
    """The processes whose death must end this one: the parent, what started its shell, and the named supervisor."""
    watched = {}
    pid = os.getppid()
    while pid > 1:
        start = process_start(pid)
        if start is None:
            break
        watched[pid] = start
        if Path(f"/proc/{pid}/comm").read_text().strip() not in SHELLS:
            break
        pid = _parent(pid)
    if supervisor:
        pid_text, _, start = supervisor.partition(":")
        watched[int(pid_text)] = start
    return watched


def end_with_ancestors(supervisor: str | None) -> None:
    """Start a thread that kills this process as soon as an ancestor, or the supervisor, is gone.

    Args:
        supervisor: `<pid>:<kernel start time>` of a process that is no direct ancestor's child, or None.
    """
    if not Path("/proc/self/stat").exists():
        return
    watched = _watched(supervisor)

    def watch() -> None:
        while all(process_start(pid) == start for pid, start in watched.items()):
            time.sleep(POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="watchdog", daemon=True).start()


def insist_on_sigterm(grace_s: float, exit_code: int = 143) -> None:
    """End this process `grace_s` after a SIGTERM that it has not followed; call it in the main thread.

    A handler written in Python waits for the main thread, which may wait for another process inside a library. The
    interpreter notes the signal at once in a socket, and a thread of its own reads that.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def watch() -> None:
        with reader, writer:
            while reader.recv(1)[0] != signal.SIGTERM:
                pass
            time.sleep(grace_s)
            os._exit(exit_code)

    threading.Thread(target=watch, name="insist", daemon=True).start()
