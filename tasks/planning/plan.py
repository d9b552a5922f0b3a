"""The plan of a run: for each of its stages what it takes of this machine, and what does not fit.

Seconds are those of a machine that does nothing else; bytes are resident bytes of the stage's process.
"""

import json
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from rlhf_core.config import Params
from rlhf_core.errors import ConfigError
from rlhf_core.planning.estimates import Rates, resident_bytes
from rlhf_core.planning.footprints import footprint
from rlhf_core.planning.parts import Footprint, Planned
from rlhf_core.planning.probe import Probed, ProbeRequest
from rlhf_core.planning.shapes import ModelShape, shape_of_config, shape_of_numbers
from rlhf_core.planning.workload import Workload
from tasks.frame.at_once import GPUS, cores, free_bytes
from tasks.frame.machine_memory import pass_bytes
from tasks.planning.asking import counted, probe_request, probed
from tasks.planning.beside import seconds_beside
from tasks.planning.kept import processor

HEADROOM = 0.95
"""Of what is free now, that a stage may take: others on the machine move too."""
COPIES = 2
"""Of what a stage writes: in the checkout and in DVC's cache."""


class StagePlan(BaseModel):
    """What one stage takes.

    Attributes:
        cached: it is up to date and would not run.
        parameters, trained_parameters: of the model that it makes or uses; 0 for a stage without one.
        memory_bytes: the most that its process is resident with.
        memory_at: the moment at which.
        disk_bytes: outputs, twice where DVC keeps a copy; checkpoints while it trains come on top.
        checkpoint_bytes: what these come to.
        tokens: that go through a model or come out of one.
        steps: of the optimiser, or rollouts.
        seconds: expected; null where nothing was measured.
    """

    model_config = ConfigDict(frozen=True)

    stage: str
    cached: bool = False
    parameters: int = 0
    trained_parameters: int = 0
    memory_bytes: int = 0
    memory_at: str = ""
    disk_bytes: int = 0
    checkpoint_bytes: int = 0
    tokens: int = 0
    steps: int = 0
    seconds: float | None = None


class Machine(BaseModel):
    """What there is.

    Attributes:
        free_memory_bytes: that may still be used, without swap; less where a container gives less.
        free_disk_bytes: where the checkout lies.
    """

    model_config = ConfigDict(frozen=True)

    processor: str
    cores: float
    free_memory_bytes: int
    free_disk_bytes: int


class Problem(BaseModel):
    """Something that does not fit, and the smallest change that makes it fit; none where none was found."""

    model_config = ConfigDict(frozen=True)

    stage: str
    what: str
    needed_bytes: int
    free_bytes: int
    cure: tuple[str, ...] = ()


class Plan(BaseModel):
    """Everything that `rlhf plan --json` says.

    Attributes:
        stages: in their order.
        counted: where rows were counted, by what they are.
        sampled: rows of each kind whose tokens were counted.
        problems: what does not fit.
        measured: seconds come from a probe; else there are none.
    """

    model_config = ConfigDict(frozen=True)

    schema_version: int = 1
    machine: Machine
    stages: tuple[StagePlan, ...]
    counted: dict[str, str]
    sampled: int
    measured: bool
    problems: tuple[Problem, ...] = ()

    @property
    def to_run(self) -> tuple[StagePlan, ...]:
        """The stages that would run."""
        return tuple(stage for stage in self.stages if not stage.cached)

    @property
    def seconds(self) -> float | None:
        """Of all stages one after the other."""
        found = [stage.seconds for stage in self.to_run if stage.seconds is not None]
        return sum(found) if len(found) == len(self.to_run) else None


class Known(BaseModel):
    """What a plan is made of beside the settings, which may change while a cure is looked for."""

    model_config = ConfigDict(frozen=True)

    shape: ModelShape
    workload: Workload
    request: ProbeRequest | None = None
    probed: Probed | None = None
    on_gpu: bool = False


def machine_of(root: Path) -> Machine:
    """This machine now."""
    return Machine(
        processor=processor(),
        cores=cores(),
        free_memory_bytes=free_bytes(),
        free_disk_bytes=shutil.disk_usage(root).free,
    )


def known_of(root: Path, params: Params, stale: Collection[str], *, ask: bool = True) -> Known | None:
    """Count and measure, or find what was counted and measured before; None where `ask` is false and nothing was.

    Raises:
        ConfigError: the sizes of the model are not known by name.
        EnvironmentProblem: counting or measuring failed.
    """
    workload = counted(root, params, stale, ask=ask)
    if workload is None:
        return None
    shape = model_shape(root, params, workload)
    request = probe_request(root, params, shape, workload)
    return Known(
        shape=shape,
        workload=workload,
        request=request,
        probed=probed(root, request, ask=ask),
        on_gpu=params.compute.device != "cpu" and any(GPUS.glob("*")),
    )


def model_shape(root: Path, params: Params, workload: Workload) -> ModelShape:
    """The numbers of the model that a run works with.

    Raises:
        ConfigError: see `shape_of_config`; or the folder has no readable `config.json`.
    """
    if params.model.source == "config":
        shape = shape_of_numbers(params.model)
        return shape.model_copy(update={"vocabulary": workload.vocabulary or shape.vocabulary})
    path = root / params.model.path / "config.json"
    try:
        return shape_of_config(json.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}. Fix: a folder written by `save_pretrained`") from error


def stage_plans(known: Known, params: Params, stages: Sequence[str], cached: Collection[str]) -> tuple[StagePlan, ...]:
    """What each stage takes with these settings."""
    limit = None if known.on_gpu else pass_bytes(params.compute.memory_gb, None)
    planned = Planned(params=params, shape=known.shape, workload=known.workload, on_gpu=known.on_gpu, pass_bytes=limit)
    return tuple(
        StagePlan(stage=stage, cached=True) if stage in cached else _stage(known, planned, stage) for stage in stages
    )


def _stage(known: Known, planned: Planned, stage: str) -> StagePlan:
    found = footprint(planned, stage)
    base = known.probed.base_bytes if known.probed else None
    return StagePlan(
        stage=stage,
        parameters=found.parameters,
        trained_parameters=found.trained,
        memory_bytes=resident_bytes(found.peak.bytes, base, trains=bool(found.trained)),
        memory_at=found.peak.name,
        disk_bytes=COPIES * found.written,
        checkpoint_bytes=found.checkpoints,
        tokens=found.tokens,
        steps=found.steps,
        seconds=_seconds(known, planned, stage, found),
    )


def _seconds(known: Known, planned: Planned, stage: str, found: Footprint) -> float | None:
    if known.probed is None or known.request is None:
        return None
    rates = Rates(probed=known.probed, request=known.request, layers=known.shape.layers)
    return sum(map(rates.seconds, found.work)) + seconds_beside(stage, planned, found)


def problems(plans: Sequence[StagePlan], machine: Machine) -> list[Problem]:
    """Stages that need more memory than is free, and a run that needs more disk."""
    memory = int(HEADROOM * machine.free_memory_bytes)
    found = [
        Problem(stage=plan.stage, what="memory", needed_bytes=plan.memory_bytes, free_bytes=machine.free_memory_bytes)
        for plan in plans
        if not plan.cached and plan.memory_bytes > memory
    ]
    disk = sum(plan.disk_bytes for plan in plans) + max((plan.checkpoint_bytes for plan in plans), default=0)
    if disk > HEADROOM * machine.free_disk_bytes:
        found.append(Problem(stage="", what="disk", needed_bytes=disk, free_bytes=machine.free_disk_bytes))
    return found
