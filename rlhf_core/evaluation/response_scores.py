"""What a reward model says of many responses, one record each, in the order given."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlhf_core.engine.batches import collate
from rlhf_core.errors import check_finite
from rlhf_core.models.scoring.ensemble import RewardEnsemble
from rlhf_core.models.scoring.reward_model import Details, RewardModel


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


@torch.no_grad()
def read_responses(
    model: RewardModel | RewardEnsemble,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    *,
    pad_id: int,
    batch_size: int,
) -> list[ResponseScore]:
    """Read every response; rows of like length share a batch, the very ones of `judges.reward_scores`.

    Raises:
        Diverged: the score of a response, its deviation or that of a member is no finite number.
    """
    device = model.shift.device
    order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]) + len(responses[row]), row))
    readings: dict[int, ResponseScore] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = collate([prompts[row] for row in rows], [responses[row] for row in rows], pad_id).to(device)
        readings |= dict(zip(rows, _rows(model.details(batch)), strict=True))
    found = [readings[row] for row in range(len(prompts))]
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
