"""Which responses of a rollout share a minibatch, and which of these go through a model together."""

from collections.abc import Sequence

import torch

from rlhf_core.engine.batches import cut

LEAST_FILLED = 0.6
"""Where padding is computed, responses share a pass as long as the shortest has this share of the longest's tokens."""


def mixed_minibatches(rows: Sequence[int], group_size: int, size: int, generator: torch.Generator) -> list[list[int]]:
    """Deal the rows to minibatches of `size` at random, the responses to one prompt beside each other.

    Not by length: a gradient step is the same for every minibatch (its norm is clipped, Adam scales it), so tokens of
    short responses among themselves would count several times what those of long ones do.
    """
    groups = cut(rows, group_size)
    mixed = [row for group in torch.randperm(len(groups), generator=generator).tolist() for row in groups[group]]
    return cut(mixed, size)


def passes(
    rows: Sequence[int], lengths: Sequence[int], group_size: int, microbatch: int | None, *, padded: bool
) -> list[list[int]]:
    """Cut a process's rows of a minibatch into passes, by length, which spares padding where it is computed.

    Args:
        rows: numbers of the rows, one at least.
        lengths: response tokens of every row of the rollout.
        group_size: responses to one prompt, which stay together: their prompt may be computed once.
        microbatch: most rows of a pass.
        padded: whether padding costs what tokens cost; then rows of very different length share no pass either.
    """
    longest: dict[int, int] = {}
    for row in rows:
        longest[row // group_size] = max(longest.get(row // group_size, 0), lengths[row])
    pieces: list[list[int]] = []
    for row in sorted(rows, key=lambda row: (longest[row // group_size], row)):
        length = longest[row // group_size]
        full = pieces and microbatch and len(pieces[-1]) == microbatch
        apart = pieces and padded and longest[pieces[-1][0] // group_size] < LEAST_FILLED * length
        if not pieces or full or apart:
            pieces.append([])
        pieces[-1].append(row)
    return pieces
