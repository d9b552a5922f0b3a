"""Toy preference pairs, and two processes played by two threads."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_core.data.batching.pairs import PairLabel, PreferenceGroup, PreferencePair, group_pairs

PAD, EOS, GOOD, BAD = 0, 1, 5, 6


def toy_groups(count: int, seed: int = 1, labels: Sequence[PairLabel] = (PairLabel(),)) -> list[PreferenceGroup]:
    """Prompts with two chosen and two rejected responses each, all four compared: responses in several pairs.

    A chosen response ends with `GOOD`, a rejected one with `BAD`; `labels` are dealt out in turn.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(most: int) -> list[int]:
        length = int(torch.randint(1, most, (1,), generator=generator))
        return torch.randint(7, 24, (length,), generator=generator).tolist()

    pairs: list[PreferencePair] = []
    for _ in range(count):
        prompt = noise(8)
        chosen = [[*noise(5), GOOD, EOS] for _ in range(2)]
        rejected = [[*noise(6), BAD, EOS] for _ in range(2)]
        for one in chosen:
            for two in rejected:
                label = labels[len(pairs) % len(labels)]
                pairs.append(PreferencePair(prompt=prompt, chosen=one, rejected=two, label=label))
    return group_pairs(pairs)


class ThreadWorld:
    """One of several processes, played by threads that meet at every exchange."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, board: dict[int, Any]) -> None:
        self.rank, self.size, self._barrier, self._board = rank, size, barrier, board

    def share(self, rows: Sequence[Any]) -> list[Any]:
        return list(rows[self.rank :: self.size])

    def collect(self, items: Sequence[Any]) -> list[Any]:
        boards = self._exchange(list(items))
        return [board[place] for place in range(max(map(len, boards))) for board in boards if place < len(board)]

    def total(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._exchange(tensor.detach().clone())).sum(0)

    def _exchange(self, mine: Any) -> list[Any]:
        self._board[self.rank] = mine
        self._barrier.wait(timeout=60)
        everyone = [self._board[rank] for rank in range(self.size)]
        self._barrier.wait(timeout=60)
        return everyone


def in_processes(size: int, work: Callable[[ThreadWorld], Any]) -> list[Any]:
    """What `work` returns in each of `size` processes; an error in one of them is raised here."""
    barrier, board = threading.Barrier(size), {}
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadWorld(rank, size, barrier, board))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
