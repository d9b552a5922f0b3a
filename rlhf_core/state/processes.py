"""Several processes as one `World`: started by torchrun, joined by Accelerate, gloo between CPUs, NCCL between GPUs."""

import re
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from rlhf_core.errors import EnvironmentProblem
from rlhf_core.state.world import Item

STALL = timedelta(minutes=30)
"""Longest wait for another process. One that dies is noticed at once; this ends a run in which one hangs."""

SOURCE = re.compile(r"^\[[^\]]*\] ")  # gloo begins with the place in its own code

Result = TypeVar("Result")


class LostProcess(EnvironmentProblem):
    """Another process of the run is gone, or did not come within `STALL`; its own message says why."""


class Processes:
    """The processes of a torchrun, as a `World`. Every call below is made by all of them, in the same order.

    Sums are made by one ring of fixed order: the same bits in every process and in every run of as many processes.

    Args:
        cpu: tensors live on the CPU, though there be a GPU.

    Raises:
        LostProcess: the processes did not find each other.
    """

    def __init__(self, *, cpu: bool) -> None:
        from accelerate import PartialState

        self._state = _exchange("joining", lambda: PartialState(cpu=cpu, timeout=STALL))
        self.rank: int = self._state.process_index
        self.size: int = self._state.num_processes
        self.device: torch.device = self._state.device

    def share(self, rows: Sequence[Item]) -> list[Item]:
        """Every `size`-th row, from row `rank` on: rows sorted by length stay evenly dealt."""
        return list(rows[self.rank :: self.size])

    def collect(self, items: Sequence[Item]) -> list[Item]:
        """All processes' items: one from each in turn, the reverse of `share`. Tensors among them lie on the CPU."""
        from accelerate.utils import gather_object

        mine = [(place, self.rank, item) for place, item in enumerate(items)]
        everyone: list[tuple[int, int, Any]] = _exchange("collect", lambda: gather_object(mine))
        return [item for _, _, item in sorted(everyone, key=lambda entry: entry[:2])]

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, on the tensor's own device; carries no gradient."""
        from accelerate.utils import reduce

        mine = tensor.detach().to(self.device)
        return _exchange("total", lambda: reduce(mine, "sum")).to(tensor.device)

    def leave(self) -> None:
        """Take leave of the others; no call after it. All do so before the first of them ends."""
        _exchange("leave", self._state.wait_for_everyone)
        self._state.destroy_process_group()


def _exchange(what: str, call: Callable[[], Result]) -> Result:
    try:
        return call()
    except RuntimeError as error:  # what gloo, NCCL and the rendezvous raise
        reason = SOURCE.sub("", str(error).strip()).partition("\n")[0].partition(". ")[0]
        raise LostProcess(
            f"processes: {what}: another process of this run is gone ({reason}). "
            "Fix: see why it ended, then run again; training goes on from the newest checkpoint"
        ) from error
