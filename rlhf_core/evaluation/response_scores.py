"""What a model says of many responses, one item each, in the order given: scores, records, or what else is read.

It needs no SciPy, so that trainers can read here too.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import torch
from torch import nn

from rlhf_core.engine.batches import ROWS_AT_ONCE, SequenceBatch, by_length, collate
from rlhf_core.engine.memory import fitting_to_read
from rlhf_core.errors import check_finite
from rlhf_core.models.scoring.ensemble import RewardEnsemble
from rlhf_core.models.scoring.reward_model import Details, RewardModel
from rlhf_core.state.compute_mode import compute_mode

Item = TypeVar("Item")
Tokens: TypeAlias = Sequence[list[int]]


def read_each(
    read: Callable[[SequenceBatch], Iterable[Item]],
    prompts: Tokens,
    responses: Tokens,
    *,
    pad_id: int,
    model: nn.Module,
    batch_size: int = ROWS_AT_ONCE,
) -> list[Item]:
    """What a model says of each response, in the order given; rows of like length share a forward pass.

    Args:
        read: one item for each row of a batch.
        prompts: their tokens.
        responses: one each.
        pad_id: fills rows of unequal length.
        model: what reads, which says where and how much of it fits at once (`rlhf_core.engine.memory`).
        batch_size: most rows of a pass, where the process sets no number (`ComputeMode.scored_rows`).
    """
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    passes = fitting_to_read(model, by_length(lengths, compute_mode().scored_rows or batch_size), lengths)
    device = next(model.parameters()).device
    found = dict(read_passes(read, prompts, responses, passes, pad_id=pad_id, device=device))
    return [found[row] for row in range(len(prompts))]


@torch.no_grad()
def read_passes(
    read: Callable[[SequenceBatch], Iterable[Item]],
    prompts: Tokens,
    responses: Tokens,
    passes: Iterable[Sequence[int]],
    *,
    pad_id: int,
    device: torch.device,
) -> Iterator[tuple[int, Item]]:
    """Each row of each pass, and what a model says of it, pass after pass.

    Args:
        read: see `read_each`.
        passes: numbers of the rows that share a forward pass.
    """
    for rows in passes:
        batch = collate([prompts[row] for row in rows], [responses[row] for row in rows], pad_id).to(device)
        yield from zip(rows, read(batch), strict=True)


def reward_scores(
    model: nn.Module, prompts: Tokens, responses: Tokens, *, pad_id: int, batch_size: int = ROWS_AT_ONCE
) -> list[float]:
    """The score of each response by a reward model or ensemble, in the order given.

    Raises:
        Diverged: the score of a response is no finite number.
    """
    scores = read_each(
        lambda batch: model(batch).tolist(), prompts, responses, pad_id=pad_id, model=model, batch_size=batch_size
    )
    check_finite(scores, "reward model: the score of response", "look at artifacts/reward/model and at that response")
    return scores


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseScore:
    """One response as a reward model sees it.

    Attributes:
        score: standardised.
        deviation: standard deviation of the score, on its scale; None where the model gives none.
        criteria: raw score for each criterion, where there are several, else empty.
        members: raw score of each member of an ensemble, else empty.
    """

    score: float
    deviation: float | None = None
    criteria: tuple[float, ...] = ()
    members: tuple[float, ...] = ()


def read_responses(
    model: RewardModel | RewardEnsemble,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    *,
    pad_id: int,
    batch_size: int = ROWS_AT_ONCE,
) -> list[ResponseScore]:
    """Read every response, in the very batches of `reward_scores`.

    Raises:
        Diverged: the score of a response, its deviation or that of a member is no finite number.
    """
    found = read_each(
        lambda batch: _rows(model.details(batch)),
        prompts,
        responses,
        pad_id=pad_id,
        model=model,
        batch_size=batch_size,
    )
    check_finite([one.score for one in found], "reward model: the score of response")
    check_finite([one.deviation or 0.0 for one in found], "reward model: the deviation of the score of response")
    # a median and ranks are numbers although a member's score is infinite
    for number, scores in enumerate(zip(*(one.members for one in found), strict=True)):
        check_finite(scores, f"reward model: member {number}: the score of response")
    return found


def _rows(details: Details) -> list[ResponseScore]:
    scores = details.scores_B.tolist()
    nothing: list[None] = [None] * len(scores)
    deviations = nothing if details.deviations_B is None else details.deviations_B.tolist()
    criteria = [()] * len(scores) if details.criteria_BC is None else map(tuple, details.criteria_BC.tolist())
    members = [()] * len(scores) if details.members_MB is None else map(tuple, details.members_MB.t().tolist())
    return [
        ResponseScore(score=score, deviation=deviation, criteria=by_criterion, members=by_member)
        for score, deviation, by_criterion, by_member in zip(scores, deviations, criteria, members, strict=True)
    ]
