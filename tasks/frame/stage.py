"""What a stage's body works with: its parameters, inputs and outputs, randomness, checkpoints and progress.

A stage's body is `run(stage) -> metrics` and only does its own work; what every stage needs to be killed, resumed,
watched and reproduced stands here.
"""

import csv
import io
import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from rlhf_core.config import Params
from rlhf_core.faults import faultpoint
from rlhf_core.state.atomic import canonical_json, digest_of, publish_folder, write_text
from rlhf_core.state.compute_mode import compute_mode
from tasks import paths
from tasks.frame.definition import StageDefinition, input_digests
from tasks.frame.place import ONLY_PROCESS, Place, prepare_device

if TYPE_CHECKING:
    import torch
    from torch import nn

    from rlhf_core.state.checkpoint import Checkpointer
    from rlhf_core.state.processes import Processes
    from rlhf_core.state.rng import StepRng
    from rlhf_core.state.train_state import TrainState
    from rlhf_core.state.world import World

    Module = TypeVar("Module", bound=nn.Module)

LINE_EVERY_SECONDS = 2.0


class HelperDone(BaseException):
    """A process that is not the first has trained to the end and has nothing more to do."""


class Progress:
    """Writes live figures, with times, to `.rlhf/progress/<stage>.jsonl`, and now and then a line to stdout."""

    def __init__(self, path: Path, *, lines: bool = True) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = path.open("w", encoding="utf-8")
        self._lines = lines
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
        if self._lines and (now - self._last_line >= LINE_EVERY_SECONDS or step == total):
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
        place: which of the stage's processes this one is.
        texts: what was lost in making tokens, by what was encoded (`tasks.stages.texts`).
    """

    def __init__(
        self,
        definition: StageDefinition,
        params: Params,
        root: Path,
        out: Path,
        log: Progress,
        place: Place = ONLY_PROCESS,
    ) -> None:
        self.definition, self.params, self.root, self.out, self.log = definition, params, root, out, log
        self.place = place
        self.name = definition.name
        self.item = self.name.partition("@")[2]
        self.history: list[dict[str, float]] = []
        self.texts: dict[str, Any] = {}
        self._identity: dict[str, str] | None = None
        self._keeper: Checkpointer | None = None
        self._world: Processes | None = None
        self._divided: list[tuple[nn.Module, nn.Module]] = []

    @property
    def device(self) -> "torch.device":
        """The device of the parameters, with threads, deterministic algorithms and the compute mode set on first use.

        Raises:
            EnvironmentProblem: a GPU is asked for and there is none.
        """
        return prepare_device(self.params.compute, self.threads, self.place)

    @property
    def threads(self) -> int:
        """CPU threads of this process: `compute.threads` divided among the processes of this machine."""
        return max(1, self.params.compute.threads // self.place.local_size)

    @property
    def world(self) -> "World":
        """The processes that train together; joined on first use, until `finish`."""
        from rlhf_core.state.world import ALONE

        if self._world is None and self.place.size > 1:
            from rlhf_core.state.processes import Processes

            self._world = Processes(cpu=self.device.type == "cpu")
        return self._world or ALONE

    def shard(self, module: "Module") -> "Module":
        """The module to train: `module`, or with `compute.sharding: fsdp` a copy divided among the processes.

        A module that was divided is empty until `make_whole` or `finish` gives it the trained weights.
        """
        if self.params.compute.sharding == "none" or self.world.size == 1:
            return module
        from rlhf_core.state.sharding import shard

        divided = shard(module)
        self._divided.append((module, divided))
        return divided

    def make_whole(self, state: "TrainState") -> None:
        """Give modules that were divided the trained weights back, and put them into `state`; all processes call."""
        from rlhf_core.state.sharding import restore_whole

        for module, divided in self._divided:
            restore_whole(module, divided)
            state.modules = {name: module if other is divided else other for name, other in state.modules.items()}
        self._divided.clear()

    def finish(self, state: "TrainState") -> None:
        """End what the processes do together: `state` has whole modules; the first goes on alone, the others end.

        Raises:
            HelperDone: in every process but the first.
        """
        if self._world is None:
            return
        self.make_whole(state)
        self._world.leave()
        self._world = None
        if self.place.rank:
            raise HelperDone
        self.place = Place()

    def rng(self, step: int = 0) -> "StepRng":
        """Addressed randomness of this stage."""
        from rlhf_core.state.rng import StepRng

        return StepRng(self.params.seed, self.name, step)

    def restore(self, state: "TrainState") -> "TrainState":
        """Load the newest verified checkpoint into `state`, if there is one, and return it."""
        self.history = state.history
        resumed = self._checkpointer().restore(state)
        self.history = state.history
        if resumed and self.place.rank == 0:
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
                "environment": digest_of(environment(str(self.device), self.threads, self.place.size) | self._memory()),
            }
        return self._identity

    def _memory(self) -> dict[str, str]:
        """What decides, beside the parameters, which rows go through a model together."""
        return {"pass_bytes": str(compute_mode().pass_bytes)}

    def depends_on(self, name: str, digest: str) -> None:
        """Make something that `dvc.yaml` does not name part of `identity`; to be called before `restore`."""
        self.identity()[name] = digest

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

    def _checkpointer(self) -> "Checkpointer":
        if self._keeper is None:
            from rlhf_core.state.checkpoint import Checkpointer

            self._keeper = Checkpointer(self.checkpoint_folder(), self.identity(), world=self.world)
        return self._keeper


def environment(device: str, threads: int, processes: int) -> dict[str, str]:
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
        "processes": str(processes),
        "device": device.partition(":")[0] + (f" {gpu}" if gpu else ""),
    }


def publish(stage: Stage, metrics: dict[str, Any]) -> None:
    """Rename a finished stage's outputs into place, then write its figures and curves."""
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
