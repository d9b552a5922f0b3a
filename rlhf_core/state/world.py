"""The processes that train one model together.

Choices are addressed (`StepRng`), so every process knows all rows of a step without being told. Each computes its
share, losses are divided by totals over all rows, and gradients are summed: two processes then take the very step
that one process takes, but for the order of sums.
"""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from torch import Tensor

Item = TypeVar("Item")


class World(Protocol):
    """What a trainer needs to know of the other processes.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
    """

    rank: int
    size: int

    def share(self, rows: Sequence[Item]) -> list[Item]:
        """This process's part of the rows that all processes know."""
        ...

    def collect(self, items: Sequence[Item]) -> list[Item]:
        """All processes' items in the order of the rows that `share` dealt out; the same list everywhere."""
        ...

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, the same bits everywhere; carries no gradient."""
        ...


class Alone:
    """A world of one process."""

    rank = 0
    size = 1

    def share(self, rows: Sequence[Item]) -> list[Item]:
        """All rows."""
        return list(rows)

    def collect(self, items: Sequence[Item]) -> list[Item]:
        """The items."""
        return list(items)

    def total(self, tensor: Tensor) -> Tensor:
        """The tensor without its gradient."""
        return tensor.detach()


ALONE = Alone()
