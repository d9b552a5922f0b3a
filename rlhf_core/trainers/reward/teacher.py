"""What an ensemble's members know of each other and of the training responses, once all of them are trained.

Shape suffixes: M = members, A = responses of all groups, Q = reference scores of a member.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rlhf_core.data.batching.pair_table import pair_table
from rlhf_core.data.batching.pairs import PreferenceGroup, collate_responses
from rlhf_core.engine.batches import ROWS_AT_ONCE, SequenceBatch, cut
from rlhf_core.errors import check_finite
from rlhf_core.models.scoring.ensemble import RewardEnsemble, accuracy_weights
from rlhf_core.trainers.reward.plan import Phase

REFERENCES = 512  # scores a member's ranks are told from


@torch.no_grad()
def fit_aggregation(
    ensemble: RewardEnsemble,
    groups: Sequence[PreferenceGroup],
    plan: Sequence[Phase],
    criteria: Sequence[str],
    pad_id: int,
) -> list[float | None]:
    """Give the ensemble its members' weights and reference scores, in place.

    References are quantiles of the members' raw scores of all training responses.

    Raises:
        Diverged: a member's score is no finite number.

    Returns:
        For each member the share of pairs it has right on prompts that it did not draw, its own weight's source; None
        where it drew all.
    """
    batches = _batches(ensemble, groups, pad_id)
    scores_MA = torch.cat([ensemble.member_scores(batch) for batch in batches], 1)
    for number, scores_A in enumerate(scores_MA.tolist()):
        check_finite(scores_A, f"reward: member {number}: the score of training response")
    accuracies, counts = [], []
    for scores_A, phase in zip(scores_MA, (one for one in plan if not one.distills), strict=True):
        share, count = _left_out_accuracy(scores_A, groups, phase, criteria)
        accuracies.append(share)
        counts.append(count)
    if ensemble.aggregate == "accuracy":
        weights = accuracy_weights([0.5 if share is None else share for share in accuracies], counts)
        ensemble.weights_M = torch.tensor(weights).to(ensemble.shift)
    if ensemble.aggregate == "vote":
        count = min(REFERENCES, scores_MA.shape[1])
        ranks_Q = torch.linspace(0, scores_MA.shape[1] - 1, count).long()
        ensemble.reference_MQ = scores_MA.sort(1).values[:, ranks_Q].contiguous()
    return accuracies


@torch.no_grad()
def teacher_scores(ensemble: RewardEnsemble, groups: Sequence[PreferenceGroup], pad_id: int) -> Tensor:
    """Raw scores of all responses, [1 + M, A], on the CPU: aggregated in row 0, those of the members below."""
    scores = []
    for batch in _batches(ensemble, groups, pad_id):
        scores_B, members_MB = ensemble.aggregate_and_members(batch)
        scores.append(torch.cat([scores_B[None], members_MB]).cpu())
    return torch.cat(scores, 1)


def _batches(ensemble: RewardEnsemble, groups: Sequence[PreferenceGroup], pad_id: int) -> Iterator[SequenceBatch]:
    for some in cut(groups, ROWS_AT_ONCE):  # groups, in their order: scores of all responses stand in it
        yield collate_responses(some, pad_id).to(ensemble.shift.device)


def _left_out_accuracy(
    scores_A: Tensor, groups: Sequence[PreferenceGroup], phase: Phase, criteria: Sequence[str]
) -> tuple[float | None, int]:
    """Share of pairs right on groups that are not among `phase.drawn`, a tie of scores half; and how many pairs."""
    table = pair_table(groups, criteria).to(scores_A.device)
    left_out_G = torch.ones(len(groups), dtype=torch.bool, device=scores_A.device)
    left_out_G[list(phase.drawn)] = False
    pairs = table.rows(left_out_G[table.group_N] & ~table.tie_N)
    if not len(pairs):
        return None, 0
    margin_N = scores_A[pairs.chosen_N] - scores_A[pairs.rejected_N]
    return (0.5 * (margin_N.sign() + 1.0)).mean().item(), len(pairs)
