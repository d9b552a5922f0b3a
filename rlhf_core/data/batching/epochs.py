"""Which rows a pass over the data takes, and how they are cut into steps by tokens."""

from collections.abc import Sequence
from typing import Any

import torch

from rlhf_core.state.rng import StepRng

CHUNK_BATCHES = 16  # rows are sorted by length inside chunks of about so many batches


def balanced_rows(groups: Sequence[str], seed: int, stage: str, epoch: int) -> list[int]:
    """Rows of one pass in which every group has the same number of places, as many in all as there are rows.

    A group that is larger than its places goes on in the next pass where it stopped in this one, a smaller one comes
    more than once; no row comes again before all of its group have come. All is decided by seed, stage and epoch.
    """
    members: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    chosen = []
    for number, (name, rows) in enumerate(sorted(members.items())):
        places = len(groups) // len(members) + (number < len(groups) % len(members))
        orders: dict[int, list[int]] = {}
        for draw in range(epoch * places, (epoch + 1) * places):
            lap, place = divmod(draw, len(rows))
            if lap not in orders:
                generator = StepRng(seed, stage, lap)(f"order of {name}")
                orders[lap] = torch.randperm(len(rows), generator=generator).tolist()
            chosen.append(rows[orders[lap][place]])
    return chosen


def token_batches(
    tokens: Sequence[int], lengths: Sequence[Any], budget: int, generator: torch.Generator
) -> list[list[int]]:
    """Row numbers of batches of at most `budget` tokens: shuffled, yet rows of one batch are of similar length.

    Every row comes once. A row with more tokens than the budget is a batch of its own.

    Args:
        tokens: tokens of each row, without padding.
        lengths: what rows are sorted by inside a chunk; a number a row, or a tuple.
        budget: tokens of a batch.
        generator: decides every choice.
    """
    order = torch.randperm(len(tokens), generator=generator).tolist()
    batches: list[list[int]] = []
    for chunk in within_budget(order, tokens, CHUNK_BATCHES * budget):
        batches += within_budget(sorted(chunk, key=lambda row: lengths[row]), tokens, budget)
    return [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]


def within_budget(rows: Sequence[int], tokens: Sequence[int], budget: int) -> list[list[int]]:
    """Successive rows in groups of at most `budget` tokens, or of one row."""
    groups: list[list[int]] = []
    used = 0
    for row in rows:
        if not groups or used + tokens[row] > budget:
            groups.append([])
            used = 0
        groups[-1].append(row)
        used += tokens[row]
    return groups
