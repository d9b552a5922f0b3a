"""Time, work and memory of the steps of one worker process."""

import resource
import time
from pathlib import Path

import torch

HIGH_WATER = "VmHWM"


def synchronise(device: str) -> None:
    """Wait until the device has done what it was asked to do; a CPU always has."""
    if device != "cpu":
        torch.cuda.synchronize()


class Clock:
    """Counts tokens, CPU-seconds and wall seconds of the steps after the warm-up.

    A worker calls `begin` when everything is loaded, and `tick` after each step. Peak memory is from `begin` on,
    warm-up included: of the whole process, or on a GPU of its tensors there.
    """

    def __init__(self, warmup: int, device: str = "cpu") -> None:
        self.warmup, self.device, self.steps, self.tokens = warmup, device, 0, 0
        self._ticks = 0

    def begin(self) -> None:
        """Start: what came before (imports, loading, reference log-probabilities) is not counted."""
        self._held_mb = self._memory_mb("VmRSS")
        if self.device == "cpu":
            _forget_peak()
        else:
            torch.cuda.reset_peak_memory_stats()
        self._mark()

    def tick(self, tokens: int) -> None:
        """A step is over that read `tokens` tokens which are not padding, prompts counted once a response."""
        self._ticks += 1
        if self._ticks <= self.warmup:
            self._mark()
            return
        self.steps += 1
        self.tokens += tokens
        synchronise(self.device)
        self._cpu_end, self._wall_end = time.process_time(), time.perf_counter()
        self._peak_mb = self._memory_mb(HIGH_WATER)

    def figures(self) -> dict[str, float]:
        """What was counted.

        Raises:
            RuntimeError: no step came after the warm-up.
        """
        if not self.steps:
            raise RuntimeError(f"{self._ticks} steps, all of them warm-up: nothing was measured")
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "cpu_s": self._cpu_end - self._cpu,
            "wall_s": self._wall_end - self._wall,
            "held_mb": self._held_mb,
            "peak_mb": self._peak_mb,
        }

    def _memory_mb(self, key: str) -> float:
        if self.device == "cpu":
            return _status_mb(key)
        read = torch.cuda.max_memory_allocated if key == HIGH_WATER else torch.cuda.memory_allocated
        return read() / 2**20

    def _mark(self) -> None:
        synchronise(self.device)
        self._cpu, self._wall = time.process_time(), time.perf_counter()


def _status_mb(key: str) -> float:
    """A figure of /proc/self/status in MiB; the highest ever where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


def _forget_peak() -> None:
    """Let the kernel measure the peak from here on, where it allows that; else it is the peak since the start."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return
