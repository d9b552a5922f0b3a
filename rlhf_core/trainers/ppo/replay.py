"""Old responses that are learned from again: drawn by priority, weighed by how likely they still are.

A replayed response was written by an older policy. Each of its tokens counts by the truncated importance weight
min(pi_now / pi_then, cap); PPO's own ratio still starts from 1, since its old log-probabilities are those of the policy
of now (the decoupled objective of Hilton, Cobbe and Schulman 2022). Drawn by priority as in Schaul et al. 2016.
Entries are groups: the responses to one prompt of one rollout, since some advantages compare these with each other.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

import torch
from torch import Tensor

from rlhf_core.config.ppo import ReplayConfig
from rlhf_core.objectives.replay import (
    draw_systematically,
    inclusion_probabilities,
    priority_probabilities,
    priority_weights,
)

TENSORS = "replay/"
SMALLEST_PRIORITY = 1e-3
"""Added to every |advantage|: a group that taught nothing once may still be drawn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """A response and what is known of it wherever it is learned from.

    Attributes:
        prompt: index of its prompt.
        response_ids: its tokens.
        finished: whether it ended by itself.
        logprobs: of its tokens under the policy that wrote it; empty while that is the policy of now.
        score: the reward model's score; NaN before it is asked.
        further: weighted sum of the rewards beside it.
        weight: what takes back that it was drawn unevenly; 1 for a fresh response.
    """

    prompt: int
    response_ids: list[int]
    finished: bool
    logprobs: list[float] = field(default_factory=list)
    score: float = float("nan")
    further: float = 0.0
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Responses to one prompt, written in one rollout, and how much they taught when last learned from."""

    responses: tuple[Written, ...]
    priority: float


def recall(cfg: ReplayConfig, tensors: Mapping[str, Tensor], generator: torch.Generator) -> list[Written]:
    """The old responses that this rollout learns from again; none while the buffer does not hold as many."""
    return draw(from_tensors(tensors), cfg.rows, cfg.priority, cfg.correction, generator)


def remember(
    cfg: ReplayConfig,
    tensors: dict[str, Tensor],
    responses: Sequence[Written],
    priorities: Sequence[float],
    group_size: int,
) -> dict[str, float]:
    """Add groups of responses of one rollout to the buffer in `tensors`; return figures of it.

    Args:
        cfg: how many the buffer holds.
        tensors: of the training state.
        responses: with the log-probabilities they were written with, groups beside each other.
        priorities: how much each response had to teach.
        group_size: responses to one prompt.
    """
    starts = range(0, len(responses), group_size)
    new = [
        Group(
            responses=tuple(responses[start : start + group_size]),
            priority=fmean(priorities[start : start + group_size]) + SMALLEST_PRIORITY,
        )
        for start in starts
    ]
    kept = added(from_tensors(tensors), [group for group in new if math.isfinite(group.priority)], cfg.capacity)
    tensors |= to_tensors(kept)
    return {"rollout/replay_stored": float(sum(len(group.responses) for group in kept))}


def draw(
    groups: Sequence[Group], rows: int, priority: float, correction: float, generator: torch.Generator
) -> list[Written]:
    """Draw whole groups of `rows` responses together, or of none while the buffer does not hold as many.

    A group takes part with a chance in proportion to its priority to the power of `priority`, at most 1; its responses'
    weight takes this back to the degree `correction`.
    """
    count = rows // len(groups[0].responses) if groups else 0
    if not count or count > len(groups):
        return []
    chances_M = priority_probabilities(
        torch.tensor([group.priority for group in groups], dtype=torch.float64), priority
    )
    inclusion_M = inclusion_probabilities(chances_M, count)
    chosen_B = draw_systematically(inclusion_M, generator)
    weights = priority_weights(inclusion_M[chosen_B], count, len(groups), correction).tolist()
    return [
        replace(row, weight=weight)
        for index, weight in zip(chosen_B.tolist(), weights, strict=True)
        for row in groups[index].responses
    ]


def added(groups: Sequence[Group], new: Sequence[Group], capacity: int) -> list[Group]:
    """The groups with `new` behind them, without the oldest where there are more than `capacity` responses."""
    kept = [*groups, *new]
    total = sum(len(group.responses) for group in kept)
    while kept and total > capacity:
        total -= len(kept[0].responses)
        kept = kept[1:]
    return kept


def to_tensors(groups: Sequence[Group]) -> dict[str, Tensor]:
    """The buffer as flat tensors for a checkpoint; `from_tensors` gives the same buffer back, to the bit."""
    rows = [row for group in groups for row in group.responses]
    return {
        TENSORS + "group_sizes": torch.tensor([len(group.responses) for group in groups], dtype=torch.int64),
        TENSORS + "priorities": torch.tensor([group.priority for group in groups], dtype=torch.float64),
        TENSORS + "prompts": torch.tensor([row.prompt for row in rows], dtype=torch.int64),
        TENSORS + "finished": torch.tensor([int(row.finished) for row in rows], dtype=torch.int64),
        TENSORS + "scores": torch.tensor([row.score for row in rows], dtype=torch.float64),
        TENSORS + "further": torch.tensor([row.further for row in rows], dtype=torch.float64),
        TENSORS + "lengths": torch.tensor([len(row.response_ids) for row in rows], dtype=torch.int64),
        TENSORS + "ids": torch.tensor([token for row in rows for token in row.response_ids], dtype=torch.int64),
        TENSORS + "logprobs": torch.tensor([value for row in rows for value in row.logprobs], dtype=torch.float64),
    }


def from_tensors(tensors: Mapping[str, Tensor]) -> list[Group]:
    """What `to_tensors` was given; an empty buffer where there are no such tensors."""
    if TENSORS + "priorities" not in tensors:
        return []
    lists = {name.removeprefix(TENSORS): tensor for name, tensor in tensors.items() if name.startswith(TENSORS)}
    lengths = lists["lengths"].tolist()
    ids, logprobs = (lists[name].split(lengths) for name in ("ids", "logprobs"))
    rows = [
        Written(
            prompt=prompt,
            response_ids=ids[row].tolist(),
            finished=bool(finished),
            logprobs=logprobs[row].tolist(),
            score=score,
            further=further,
        )
        for row, (prompt, finished, score, further) in enumerate(
            zip(*(lists[name].tolist() for name in ("prompts", "finished", "scores", "further")), strict=True)
        )
    ]
    groups, start = [], 0
    for size, priority in zip(lists["group_sizes"].tolist(), lists["priorities"].tolist(), strict=True):
        groups.append(Group(responses=tuple(rows[start : start + size]), priority=priority))
        start += size
    return groups
