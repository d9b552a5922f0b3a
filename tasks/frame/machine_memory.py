"""How much memory this machine has, less where a container gives less, and how much of it a pass may take."""

from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
CPU_SHARE, MOST_ON_CPU, GPU_SHARE = 8, 2 * 10**9, 4
"""Shares of all memory that writing or reading responses may take. More than a few thousand tokens at a time are no
faster on a CPU, so 2 GB are enough there."""


def pass_bytes(memory_gb: float | None, gpu_bytes: int | None, processes: int = 1) -> int:
    """Memory that writing or reading responses may take beside the models: `compute.memory_gb`, or a share of all.

    It follows from how much memory there is and not from how much is free, since it decides which rows go through a
    model together, and that shows in the last bits of a result.

    Args:
        memory_gb: the setting.
        gpu_bytes: memory of the GPU that computes; None on a CPU.
        processes: of the stage, on this machine, which share a CPU's memory.
    """
    if memory_gb is not None:
        return int(memory_gb * 1e9)
    if gpu_bytes is not None:
        return gpu_bytes // GPU_SHARE
    return min(MOST_ON_CPU, total_bytes() // CPU_SHARE) // processes


def total_bytes(cgroup: Path = CGROUP) -> int:
    """Memory that this process could ever have, without swap."""
    total: int = psutil.virtual_memory().total
    limit = cgroup_words(cgroup / "memory.max")
    return min(total, int(limit[0])) if limit and limit[0].isdecimal() else total


def cgroup_words(path: Path) -> list[str]:
    """What the kernel's control group says (cgroup v2); nothing where there is none."""
    try:
        return path.read_text().split()
    except OSError:
        return []
