"""Ending a process without taking its modules apart: with torch and transformers that takes up to a second."""

import atexit
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn


def leave(job: Callable[[], int]) -> NoReturn:
    """Do `job` and end this process with the exit code that it returns.

    What a process owes at its end is done: threads that are no daemons are waited for, exit handlers run, streams are
    flushed, an exception is printed. What is left out is the interpreter's own clearing away of every object.
    """
    try:
        code = job()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        traceback.print_exception(error)
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
