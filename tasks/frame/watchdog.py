"""A stage never outlives whoever started it: an orphan would go on writing while the next run starts."""

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

SHELLS = ("sh", "dash", "bash", "zsh")
SUPERVISORS = ("RLHF_SUPERVISOR", "RLHF_LAUNCHED")  # who runs the stage through DVC; who started it as one of several
GRACE_SECONDS = 0.5  # for a process that was told to end as well, to do so in order


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


def named(pid: int) -> str:
    """`<pid>:<kernel start time>`, which names a process for good; for `SUPERVISORS`."""
    return f"{pid}:{process_start(pid)}"


def end_with_ancestors(environment: Mapping[str, str]) -> None:
    """End this process now if who started it is gone already; else start a thread that does so when they go.

    Those are the parent, what started its shell, and the processes that `SUPERVISORS` in the environment name. To be
    called before anything that takes time.
    """
    if not hasattr(os, "pidfd_open") or not Path("/proc/self/stat").exists():
        return
    chain = _chain()
    watched = dict(chain)
    for name in SUPERVISORS:
        pid, _, start = environment.get(name, "").partition(":")
        if start:
            watched[int(pid)] = start
    descriptors = [found for pid, start in watched.items() if (found := _open(pid, start)) is not None]
    if len(descriptors) < len(watched) or _orphan_of_dvc(environment, chain):
        os.kill(os.getpid(), signal.SIGKILL)

    def watch() -> None:
        poll = select.poll()
        for descriptor in descriptors:
            poll.register(descriptor, select.POLLIN)
        poll.poll()
        time.sleep(GRACE_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    if watched:
        threading.Thread(target=watch, name="watchdog", daemon=True).start()


def _chain() -> list[tuple[int, str]]:
    """The parent and, where it is a shell, what started it, and so on, each with its start."""
    chain = []
    pid = os.getppid()
    while pid > 1 and (start := process_start(pid)) is not None:
        chain.append((pid, start))
        if not _is_shell(pid):
            break
        pid = int(_about(pid, "stat").rpartition(")")[2].split()[1])
    return chain


def _is_shell(pid: int) -> bool:
    return _about(pid, "comm").strip() in SHELLS


def _orphan_of_dvc(environment: Mapping[str, str], chain: Sequence[tuple[int, str]]) -> bool:
    """Whether DVC started this process, by a shell that has outlived it: then the shell has another parent by now."""
    if "DVC_STAGE" not in environment or "RANK" in environment:
        return False
    starter = next((pid for pid, _ in chain if not _is_shell(pid)), 1)  # a shell without DVC above it is `init`'s
    command = _about(starter, "cmdline")
    if "dvc" not in command and "python" not in command:  # not `init` either, unless DVC is what a container runs
        return True
    try:
        return os.getsid(starter) != os.getsid(0)
    except ProcessLookupError:
        return True


def _open(pid: int, start: str) -> int | None:
    """A descriptor of exactly this process; None where it has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return None
    return descriptor if process_start(pid) == start else None


def _about(pid: int, what: str) -> str:
    try:
        return Path(f"/proc/{pid}/{what}").read_text(errors="replace")
    except OSError:
        return ""


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
