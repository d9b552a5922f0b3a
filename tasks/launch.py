"""`python -P tasks/launch.py <parent pid> <command…>`: become a command that the kernel kills when its parent dies.

The parent-death signal must be set in the child. Doing that between fork and exec (`preexec_fn`) can hang a program
with threads, and the caller has them; a process of its own that sets it and then execs cannot. Called by its path,
this file serves worktrees with whatever code of their own; it imports nothing of the project.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None  # before any fork


def tied(command: Sequence[str]) -> list[str]:
    """`command` as one that dies with the thread that starts it, and is not started where that is gone already."""
    return [sys.executable, "-P", str(Path(__file__).resolve()), str(os.getpid()), *command]


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies; end it now where the parent, `parent`, is gone already.

    The kernel takes the end of the thread that forked for the parent's.
    """
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def main(arguments: list[str]) -> None:
    """Tie this process to its parent and exec; does not return."""
    parent, *command = arguments
    die_with_parent(int(parent))
    os.execv(command[0], command)  # noqa: S606 - no shell is the point


if __name__ == "__main__":
    main(sys.argv[1:])
