"""The frame around every stage: parameters in, outputs published at once, resume, progress, exit codes.

A stage's body is `run(stage) -> metrics` and only does its own work; what every stage needs to be killed, resumed,
watched and reproduced stands here.
"""

import csv
import errno
import io
import json
import os
import platform
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from rlhf_core.config import Params
from rlhf_core.errors import EnvironmentProblem, RlhfError
from rlhf_core.state.atomic import (
    canonical_json,
    digest_of,
    publish_folder,
    sweep_temporary,
    temporary_folder,
    tree_digest,
    write_text,
)
from rlhf_core.state.faults import faultpoint
from tasks import paths
from tasks.definition import StageDefinition, input_digests, stage_definition

if TYPE_CHECKING:
    import torch

    from rlhf_core.state.rng import StepRng
    from rlhf_core.state.train_state import TrainState

LINE_EVERY_SECONDS = 2.0
LOCK_WAIT_SECONDS = 10.0


class Progress:
    """Writes live figures, with times, to `.rlhf/progress/<stage>.jsonl`, and now and then a line to stdout."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = path.open("w", encoding="utf-8")
        self._last_line = 0.0
        self.tokens = 0

    def event(self, kind: str, **fields: Any) -> None:
        """Append one event."""
        self._file.write(json.dumps({"event": kind, "time": time.time(), **fields}) + "\n")
        self._file.flush()

    def __call__(self, step: int, total: int, metrics: Mapping[str, float], tokens: int) -> None:
        """Report a step (a `MetricSink`)."""
        faultpoint("train.step")
        self.tokens = tokens
        self.event("progress", step=step, total=total, metrics=dict(metrics), tokens=tokens)
        now = time.monotonic()
        if now - self._last_line >= LINE_EVERY_SECONDS or step == total:
            self._last_line = now
            figures = "  ".join(f"{key} {value:.4g}" for key, value in metrics.items())
            print(f"step {step}/{total}  {figures}", flush=True)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Stage:
    """What a stage's body gets.

    Attributes:
        name: `sft`, `align@ppo`.
        item: `ppo` in `align@ppo`, else empty.
        params: all parameters.
        root: the checkout or worktree; input paths are relative to it.
        out: staging folder that becomes the stage's output folder when the body returns.
        log: reports a step (see `rlhf_core.state.train_state.MetricSink`).
    """

    def __init__(self, definition: StageDefinition, params: Params, root: Path, out: Path, log: Progress) -> None:
        self.definition, self.params, self.root, self.out, self.log = definition, params, root, out, log
        self.name = definition.name
        self.item = self.name.partition("@")[2]
        self.history: list[dict[str, float]] = []
        self._identity: dict[str, str] | None = None

    @property
    def device(self) -> "torch.device":
        """The device of the parameters, with threads and deterministic algorithms set on first use.

        Raises:
            EnvironmentProblem: a GPU is asked for and there is none.
        """
        import torch

        compute = self.params.compute
        torch.set_num_threads(compute.threads)
        torch.use_deterministic_algorithms(True)
        available = torch.cuda.is_available()
        if compute.device == "cuda" and not available:
            raise EnvironmentProblem("compute.device: cuda asked for, torch sees no GPU. Fix: set it to auto or cpu")
        return torch.device("cuda" if available and compute.device != "cpu" else "cpu")

    def rng(self, step: int = 0) -> "StepRng":
        """Addressed randomness of this stage."""
        from rlhf_core.state.rng import StepRng

        return StepRng(self.params.seed, self.name, step)

    def restore(self, state: "TrainState") -> "TrainState":
        """Load the newest verified checkpoint into `state`, if there is one, and return it."""
        self.history = state.history
        resumed = self._checkpointer().restore(state)
        self.history = state.history
        if resumed:
            print(f"resumed at step {state.step}", flush=True)
            self.log.event("resumed", step=state.step)
        return state

    def checkpoint(self, state: "TrainState") -> None:
        """Keep `state` outside DVC's outputs (a `SaveCheckpoint`)."""
        self._checkpointer().save(state)

    def identity(self) -> dict[str, str]:
        """Digests of all that decides the stage's bytes: inputs, code, parameters, versions, threads, device."""
        if self._identity is None:
            self._identity = {
                "inputs": digest_of(input_digests(self.root, self.definition)),
                "parameters": digest_of(self._own_parameters()),
                "environment": digest_of(environment(str(self.device), self.params.compute.threads)),
            }
            if self.params.model.source == "folder" and "model" in self.definition.params:
                folder = self.root / str(self.params.model.path)
                self._identity["pretrained"] = digest_of(tree_digest(folder))
        return self._identity

    def _own_parameters(self) -> dict[str, Any]:
        everything = self.params.model_dump(mode="json", by_alias=True)
        own = {}
        for key in self.definition.params:
            value: Any = everything
            for part in key.split("."):
                value = value[part]
            own[key] = value
        return own

    def checkpoint_folder(self) -> Path:
        """Folder of this stage's checkpoints under its present identity."""
        return self.root / paths.CHECKPOINTS / paths.slug(self.name) / digest_of(self.identity())[:16]

    def _checkpointer(self) -> Any:
        from rlhf_core.state.checkpoint import Checkpointer

        return Checkpointer(self.checkpoint_folder(), self.identity())


def environment(device: str, threads: int) -> dict[str, str]:
    """Versions and settings on which the last bits of a result depend."""
    import numpy
    import torch
    import transformers

    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else ""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": str(threads),
        "device": device.partition(":")[0] + (f" {gpu}" if gpu else ""),
    }


class _Terminated(BaseException):
    """SIGTERM came: leave by the ordinary way, so that temporary folders go."""


def run_stage(name: str, body: Callable[[Stage], dict[str, Any]], params: Params, root: Path) -> int:
    """Run one stage's body and publish what it wrote.

    Returns:
        The exit code of the process (ARCHITECTURE, decision 9): 0, the code of an `RlhfError`, 130, 143, or 1.
    """
    signal.signal(signal.SIGTERM, _terminate)
    definition = stage_definition(root, name)
    lock = FileLock(root / paths.LOCKS / f"{paths.slug(name)}.lock")
    (root / paths.LOCKS).mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=LOCK_WAIT_SECONDS)
    except Timeout:
        print(f"{name}: this stage is already running in {root}. Fix: wait for it, or end it", file=sys.stderr)
        return EnvironmentProblem.exit_code
    progress = Progress(root / paths.progress_file(name))
    try:
        _run_and_publish(definition, body, params, root, progress)
        return 0
    except (Exception, KeyboardInterrupt, _Terminated) as error:
        code, message = _outcome(error)
        progress.event("failed", exit_code=code, message=message)
        print(f"{name}: {message}", file=sys.stderr, flush=True)
        if code == 1:
            raise
        return code
    finally:
        progress.close()
        lock.release()


def _run_and_publish(
    definition: StageDefinition,
    body: Callable[[Stage], dict[str, Any]],
    params: Params,
    root: Path,
    progress: Progress,
) -> None:
    staging = root / paths.STAGING
    staging.mkdir(parents=True, exist_ok=True)
    sweep_temporary(staging)
    with temporary_folder(staging, paths.slug(definition.name)) as out:
        stage = Stage(definition, params, root, out, progress)
        progress.event("start", pid=os.getpid())
        started = time.monotonic()
        metrics = body(stage)
        compute_s = time.monotonic() - started
        faultpoint("stage.before_publish")
        _publish(stage, metrics)
        faultpoint("stage.after_publish")
        shutil.rmtree(root / paths.CHECKPOINTS / paths.slug(stage.name), ignore_errors=True)
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        progress.event("done", compute_s=compute_s, peak_memory_mb=peak_mb, tokens=progress.tokens)


def _publish(stage: Stage, metrics: dict[str, Any]) -> None:
    publish_folder(stage.out, stage.root / paths.stage_output(stage.name))
    faultpoint("stage.during_publish")
    if metrics:
        write_text(stage.root / paths.metrics_file(stage.name), canonical_json(metrics))
    if stage.history:
        write_text(stage.root / paths.plots_file(stage.name), curves_csv(stage.history))


def curves_csv(history: list[dict[str, float]]) -> str:
    """Rows of figures as CSV, `step` first, the other columns sorted; a figure that a row lacks is left empty."""
    columns = ["step", *sorted({key for row in history for key in row} - {"step"})]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue()


def _outcome(error: BaseException) -> tuple[int, str]:
    if isinstance(error, RlhfError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; `rlhf resume` goes on from the last checkpoint"
    if isinstance(error, _Terminated):
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
    raise _Terminated
