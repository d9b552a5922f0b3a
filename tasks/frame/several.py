"""A stage that trains in several processes (`compute.processes`), started and watched by torch's elastic agent.

The processes are `python -m tasks <stage>` again, which finds its rank in the environment. `torchrun
--nproc-per-node 2 -m tasks sft` starts the very same ones by hand; what is added here are the stage's own exit code
and one line that says what went wrong. When one process dies the agent ends the others; none is started again, since
a run that goes on from its checkpoint is what DVC and the flow already know.
"""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_core.config import Params
from tasks import paths
from tasks.catalogue import stage_row
from tasks.frame.place import Place
from tasks.frame.process import FOLLOWED, GRACE_SECONDS, LAUNCHED
from tasks.frame.watchdog import named

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

SPOKEN_CODES = (2, 3, 4, 5, 6, 7)
FOLLOWED_WEIGHT = 3
END_MESSAGE = "{}; `rlhf resume` goes on from the last checkpoint"


def wants_processes(stage: str, params: Params) -> bool:
    """Whether this process is to start the stage's processes, and is not one of them itself."""
    return _trains(stage) and params.compute.processes > 1 and Place.of(os.environ) == Place()


def _trains(stage: str) -> bool:
    row = stage_row(stage)
    return row is not None and row.trains


def only_watches(stage: str) -> bool:
    """Whether this is a further process of a torchrun by hand over a stage that one process does alone."""
    return not _trains(stage) and Place.of(os.environ).rank > 0


def run_in_processes(stage: str, params: Params, root: Path) -> int:
    """Start `compute.processes` processes of a stage on this machine, wait for them, and return the exit code.

    It is the code of the process that failed first; 7 where one was killed from outside.
    """
    os.environ |= _environment(params)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):  # its account of a failure is some forty lines; ours is one
            logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=params.compute.processes,
        run_id=f"{paths.slug(stage)}-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # a free port
        local_addr="localhost",
        max_restarts=0,
        shutdown_timeout=int(GRACE_SECONDS),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "tasks", stage)
    except ChildFailedError as error:
        cause = root_cause(error.failures, params.compute.processes)
        if not cause.reported:
            _tell(root, stage, cause)
        return cause.code
    except SignalException as error:
        code, what = (130, "interrupted") if error.sigval == signal.SIGINT else (143, "terminated")
        print(f"{stage}: {END_MESSAGE.format(what)}", file=sys.stderr, flush=True)
        return code
    return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Cause:
    """Why one process ended.

    Attributes:
        weight: 0 killed from outside, 1 failed, 2 a bug, 3 ended because another did; the lowest is the root cause.
        code: exit code that the stage gets from it.
        message: one line.
        reported: the process has printed and recorded it itself.
    """

    weight: int
    code: int
    message: str
    reported: bool = False


def root_cause(failures: Mapping[int, "ProcessFailure"], processes: int) -> Cause:
    """The failure that the others followed from; of several of one kind one that was reported, then the earliest."""

    def order(rank: int) -> tuple[int, bool, int, int]:
        cause = _cause(rank, processes, failures[rank])
        return cause.weight, not cause.reported, failures[rank].timestamp, rank

    first = min(failures, key=order)
    return _cause(first, processes, failures[first])


def _cause(rank: int, processes: int, failure: "ProcessFailure") -> Cause:
    who = f"process {rank} of {processes}"
    if isinstance(failure.message, dict):  # it left word itself
        word = failure.message["extraInfo"]
        code, kind = int(word["exit_code"]), word["kind"]
        weight = FOLLOWED_WEIGHT if kind in FOLLOWED else 2 if code == 1 else 1
        reported = rank == 0 and weight < FOLLOWED_WEIGHT
        return Cause(weight=weight, code=code, message=failure.message["message"], reported=reported)
    if failure.exitcode in (-signal.SIGTERM, 143):
        return Cause(weight=FOLLOWED_WEIGHT, code=143, message=END_MESSAGE.format("terminated"))
    if failure.exitcode < 0:
        killed = f"{who} was killed by {failure.signal_name()}, perhaps for want of memory; the others were ended"
        return Cause(weight=0, code=7, message=f"{killed}. Fix: free memory, then `rlhf resume`")
    code = failure.exitcode if failure.exitcode in SPOKEN_CODES else 1
    return Cause(weight=2, code=code, message=f"{who} ended with exit code {failure.exitcode}")


def _tell(root: Path, stage: str, cause: Cause) -> None:
    """Say and record what no process could; none of them lives any more, so there is still one writer."""
    print(f"{stage}: {cause.message}", file=sys.stderr, flush=True)
    event = {"event": "failed", "time": time.time(), "exit_code": cause.code, "message": cause.message}
    with (root / paths.progress_file(stage)).open("a", encoding="utf-8") as file:
        file.write(json.dumps(event) + "\n")


def _environment(params: Params) -> dict[str, str]:
    """What the processes find in their environment beside what the agent gives them."""
    own = {LAUNCHED: named(os.getpid())}
    if "OMP_NUM_THREADS" not in os.environ:
        own["OMP_NUM_THREADS"] = str(max(1, params.compute.threads // params.compute.processes))
    if sys.platform == "linux" and "GLOO_SOCKET_IFNAME" not in os.environ:
        own["GLOO_SOCKET_IFNAME"] = "lo"  # all on this machine, whatever its name resolves to
    return own
