"""Where a stage computes: which of its processes this one is, on which device, with what threads and numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_core.config.model import ComputeConfig
from rlhf_core.errors import EnvironmentProblem
from rlhf_core.state.compute_mode import ComputeMode, set_compute_mode
from tasks.frame.machine_memory import pass_bytes

if TYPE_CHECKING:  # only a stage that computes needs torch
    import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Which of a stage's processes this one is. The first has the lock, writes, reports; the others help it train."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Place":
        """What torchrun says in the environment; one process alone where it says nothing."""
        names = {"rank": "RANK", "size": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "local_size": "LOCAL_WORLD_SIZE"}
        if not all(name in environment for name in names.values()):
            return cls()
        return cls(**{key: int(environment[name]) for key, name in names.items()})


ONLY_PROCESS = Place()


def prepare_device(compute: ComputeConfig, threads: int, place: Place) -> "torch.device":
    """The device of the settings; threads, deterministic algorithms and the compute mode are set for the process.

    Raises:
        EnvironmentProblem: a GPU is asked for and there is none.
    """
    import torch

    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs a pass over memory that is written next
    _set_compute_mode(compute, None, place)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if compute.device == "cpu" or (compute.device == "auto" and not gpus):
        return torch.device("cpu")
    if gpus < place.local_size:
        raise EnvironmentProblem(
            f"compute.device: {compute.device}: {place.local_size} GPUs wanted, torch sees {gpus or 'none'}. "
            "Fix: set compute.device to cpu, or compute.processes to as many as there are"
        )
    device = torch.device("cuda", place.local_rank) if place.size > 1 else torch.device("cuda")
    _set_compute_mode(compute, torch.cuda.get_device_properties(device).total_memory, place)
    return device


def _set_compute_mode(compute: ComputeConfig, gpu_bytes: int | None, place: Place) -> None:
    """What the process computes by; `gpu_bytes` are a GPU's memory, None on a CPU."""
    settings = {"precision", "activation_checkpointing", "cuda_graphs", "sampled_rows", "scored_rows"}
    memory = pass_bytes(compute.memory_gb, gpu_bytes, place.local_size)
    set_compute_mode(ComputeMode(**compute.model_dump(include=settings), pass_bytes=memory))
