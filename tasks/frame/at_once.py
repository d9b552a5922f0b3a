"""How much this machine can do side by side: cores and memory, less where a container gives less."""

import os
from pathlib import Path

import psutil

from rlhf_core.config import Params
from tasks import paths
from tasks.frame.machine_memory import CGROUP, cgroup_words

GPUS = Path("/proc/driver/nvidia/gpus")  # of NVIDIA's driver, one entry each; asking it takes no torch
BASE_BYTES = 700 * 2**20
"""What a stage's process holds beside its models: the libraries, rows, activations of small models (measured: 300 to
730 MB in the demo)."""

COPIES = 12
"""Weights, gradients and two moments of policy and value model, with reward and reference model beside them, in sizes
of the one model: what PPO holds, the hungriest of the stages."""


def at_once(params: Params, root: Path) -> int:
    """How many stages, or models of one stage, may be worked on side by side: `machine.at_once`, or what fits now."""
    if params.machine.at_once is not None:
        return params.machine.at_once
    if params.compute.device != "cpu" and _has_gpu():
        return 1
    width = max(params.compute.threads, params.compute.processes)
    need = (BASE_BYTES + COPIES * weight_bytes(root / paths.SFT / "model")) * params.compute.processes
    return that_fit(cores=cores(), width=width, free_bytes=free_bytes(), need_bytes=need)


def that_fit(*, cores: float, width: int, free_bytes: int, need_bytes: int) -> int:
    """How many workers of `width` threads and `need_bytes` fit; at least one."""
    return max(1, min(int(cores) // width, free_bytes // need_bytes))


def weight_bytes(folder: Path) -> int:
    """Size of a model folder's weights, 0 where there are none yet."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def cores(cgroup: Path = CGROUP) -> float:
    """Cores that this process may use at a time."""
    known = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = cgroup_words(cgroup / "cpu.max")  # microseconds of work in so many of time; or `max`
    return min(known, int(given[0]) / int(given[1])) if given and given[0].isdecimal() else float(known)


def free_bytes(cgroup: Path = CGROUP) -> int:
    """Memory that this process may still use, without swap."""
    free: int = psutil.virtual_memory().available
    limit, used = cgroup_words(cgroup / "memory.max"), cgroup_words(cgroup / "memory.current")
    if limit and limit[0].isdecimal() and used:
        free = min(free, max(0, int(limit[0]) - int(used[0])))
    return free


def _has_gpu() -> bool:
    return any(GPUS.glob("*"))
