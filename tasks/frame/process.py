"""A stage's process: lock, staging folder, progress, publication, exit code.

A stage that trains may have several processes, started by `tasks.frame.several` or by a torchrun of the user's. The
first of them does here what a process alone does; the others only run the body, and end when training does.
"""

import errno
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rlhf_core.config import Params
from rlhf_core.errors import EnvironmentProblem, RlhfError
from rlhf_core.faults import faultpoint
from rlhf_core.state.atomic import sweep_temporary, temporary_folder
from rlhf_core.state.host_memory import map_large_blocks
from tasks import paths
from tasks.frame.definition import StageDefinition, stage_definition
from tasks.frame.lock_file import keep
from tasks.frame.place import Place
from tasks.frame.stage import HelperDone, Progress, Stage, publish
from tasks.frame.watchdog import insist_on_sigterm

Body = Callable[[Stage], dict[str, Any]]
LOCK_WAIT_SECONDS = 10.0
GRACE_SECONDS = 3.0  # that a process has to follow SIGTERM while others wait for its end
FOLLOWED = ("LostProcess", "Terminated")  # errors that follow from another process's end
LAUNCHED = "RLHF_LAUNCHED"  # set by `tasks.frame.several`, which then is the one to speak for the processes it started


class Terminated(BaseException):
    """SIGTERM came: leave by the ordinary way, so that temporary folders go."""


def run_stage(name: str, body: Body, params: Params, root: Path) -> int:
    """Run one stage's body and publish what it wrote.

    Returns:
        The exit code of the process (docs/quick-start.md, "Exit codes"): 0, the code of an `RlhfError`, 130, 143, or 1.
    """
    place = Place.of(os.environ)
    try:
        signal.signal(signal.SIGTERM, _terminate)
        if place.size > 1:
            insist_on_sigterm(GRACE_SECONDS)
        definition = stage_definition(root, name)
        with _lock(root, name, place), _progress(root, name, place) as progress:
            if place.rank == 0:
                keep(root)
            try:
                _run_and_publish(definition, body, params, root, progress, place)
            except (Exception, KeyboardInterrupt, Terminated) as error:
                code, message = _outcome(error)
                progress.event("failed", exit_code=code, message=message)
                raise
    except HelperDone:
        return 0
    except (Exception, KeyboardInterrupt, Terminated) as error:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the process is on its way out
        code, message = _outcome(error)
        kind = type(error).__name__
        _leave_word(code, message, kind)
        if _speaks(place, kind):
            who = f"{name}, process {place.rank} of {place.size}" if place.rank else name
            print(f"{who}: {message}", file=sys.stderr, flush=True)
        if code == 1:
            raise
        return code
    return 0


@contextmanager
def _lock(root: Path, name: str, place: Place) -> Iterator[None]:
    """Hold the stage's lock, if this is its first process."""
    if place.rank:
        yield
        return
    path = root / paths.LOCKS / f"{paths.slug(name)}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=LOCK_WAIT_SECONDS)
    except Timeout as error:
        raise EnvironmentProblem(f"this stage is already running in {root}. Fix: wait for it, or end it") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _progress(root: Path, name: str, place: Place) -> Iterator[Progress]:
    """The stage's progress stream in its first process, nothing in the others."""
    silent = place.rank > 0
    progress = Progress(Path(os.devnull) if silent else root / paths.progress_file(name), lines=not silent)
    try:
        yield progress
    finally:
        progress.close()


def _run_and_publish(
    definition: StageDefinition, body: Body, params: Params, root: Path, progress: Progress, place: Place
) -> None:
    staging = root / paths.STAGING
    staging.mkdir(parents=True, exist_ok=True)
    if place.rank == 0:
        sweep_temporary(staging)
    with temporary_folder(staging, paths.slug(definition.name)) as out:
        if params.machine.compact_memory:
            map_large_blocks()
        stage = Stage(definition, params, root, out, progress, place)
        progress.event("start", pid=os.getpid())
        started = time.monotonic()
        metrics = body(stage)
        if place.rank:
            raise HelperDone
        compute_s = time.monotonic() - started
        faultpoint("stage.before_publish")
        publish(stage, metrics)
        faultpoint("stage.after_publish")
        shutil.rmtree(root / paths.CHECKPOINTS / paths.slug(stage.name), ignore_errors=True)
        largest = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        peak_mb = largest / 1024
        progress.event("done", compute_s=compute_s, peak_memory_mb=peak_mb, tokens=progress.tokens)


def _speaks(place: Place, kind: str) -> bool:
    """Whether this process prints why it failed: under `tasks.frame.several` the first, and what began with it."""
    return LAUNCHED not in os.environ or (place.rank == 0 and kind not in FOLLOWED)


def _leave_word(code: int, message: str, kind: str) -> None:
    """Write why this process ends to where torchrun looks for it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        about = {"message": message, "extraInfo": {"timestamp": str(int(time.time())), "exit_code": code, "kind": kind}}
        Path(path).write_text(json.dumps({"message": about}))


def _outcome(error: BaseException) -> tuple[int, str]:
    if isinstance(error, RlhfError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; `rlhf resume` goes on from the last checkpoint"
    if isinstance(error, Terminated):
        return 143, "terminated; `rlhf resume` goes on from the last checkpoint"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(Path.cwd()).free // 2**20
        return (
            EnvironmentProblem.exit_code,
            f"{error.filename or 'disk'}: disk full ({free} MiB free). Fix: free space, run again",
        )
    return 1, f"{type(error).__name__}: {error}"


def _terminate(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise Terminated
