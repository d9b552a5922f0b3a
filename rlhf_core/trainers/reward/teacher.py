"""What an ensemble's members know of each other and of the training responses, once all of them are trained.

Shape suffixes: M = members, A = responses of all groups, Q = reference scores of a member.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf_core.config import RewardConfig
from rlhf_core.data.batching.pair_table import pair_table
from rlhf_core.data.batching.pairs import PreferenceGroup, collate_responses
from rlhf_core.engine.batches import ROWS_AT_ONCE, SequenceBatch, cut
from rlhf_core.errors import check_finite
from rlhf_core.models.scoring.ensemble import RewardEnsemble, accuracy_weights
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.trainers.reward.plan import PUBLISHED, Phase

REFERENCES = 512  # scores a member's ranks are told from


@dataclass(frozen=True, kw_only=True, slots=True)
class Aggregation:
    """How the trained members become one score.

    Attributes:
        left_out: for each member the share of pairs it has right on prompts that it did not draw; None where it drew
            all.
        weights_M: what each member counts, by that share; None where the ensemble does not weigh by accuracy.
        reference_MQ: quantiles of each member's raw scores of all training responses; None where it does not vote.
    """

    left_out: list[float | None]
    weights_M: Tensor | None = None
    reference_MQ: Tensor | None = None


def ensemble_of(
    cfg: RewardConfig, modules: Mapping[str, nn.Module], aggregation: Aggregation | None = None
) -> RewardEnsemble:
    """The members among the modules as one model, with their weights and references once these are known."""
    members = [module for name, module in modules.items() if name != PUBLISHED and isinstance(module, RewardModel)]
    ensemble = RewardEnsemble(members, cfg.ensemble.aggregate, cfg.ensemble.pessimism)
    ensemble = ensemble.to(members[0].shift.device).eval()
    if aggregation is not None and aggregation.weights_M is not None:
        ensemble.weights_M = aggregation.weights_M
    if aggregation is not None and aggregation.reference_MQ is not None:
        ensemble.reference_MQ = aggregation.reference_MQ
    return ensemble


@torch.no_grad()
def fit_aggregation(
    ensemble: RewardEnsemble,
    groups: Sequence[PreferenceGroup],
    plan: Sequence[Phase],
    criteria: Sequence[str],
    pad_id: int,
) -> Aggregation:
    """Weights and reference scores of the members, as `ensemble` aggregates, from all training responses.

    Raises:
        Diverged: a member's score is no finite number.
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
    weights_M = reference_MQ = None
    if ensemble.aggregate == "accuracy":
        weights = accuracy_weights([0.5 if share is None else share for share in accuracies], counts)
        weights_M = torch.tensor(weights).to(ensemble.shift)
    if ensemble.aggregate == "vote":
        count = min(REFERENCES, scores_MA.shape[1])
        ranks_Q = torch.linspace(0, scores_MA.shape[1] - 1, count).long()
        reference_MQ = scores_MA.sort(1).values[:, ranks_Q].contiguous()
    return Aggregation(left_out=accuracies, weights_M=weights_M, reference_MQ=reference_MQ)


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
