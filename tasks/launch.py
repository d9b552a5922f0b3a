"""`python -m tasks.launch <parent pid> <command…>`: become a command that the kernel kills when its parent dies.

The parent-death signal must be set in the child. Doing that between fork and exec (`preexec_fn`) can hang a program
with threads, and the caller has them; a process of its own that sets it and then execs cannot.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Set the signal, make sure that the parent is still there, and exec; does not return."""
    parent, *command = arguments
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):
        sys.exit(1)
    os.execv(command[0], command)  # noqa: S606 - no shell is the point


if __name__ == "__main__":
    main(sys.argv[1:])
