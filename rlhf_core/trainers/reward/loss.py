"""What the labelled pairs of one step ask of its scores: the sum of lambda_i L_i over criteria.

Everything here sees the whole step, so every mean is over all its pairs, prompts or responses.
Shape suffixes: B = responses of a step, C = criteria, D = hidden size, N = pairs, M = losers.
"""

import torch
from torch import Tensor

from rlhf_core.config.reward import RewardConfig, RewardLossConfig
from rlhf_core.data.batching.pair_table import PairTable
from rlhf_core.objectives.ranking import centering_losses, level_losses, score_margins
from rlhf_core.objectives.uncertainty import contrastive_losses
from rlhf_core.trainers.reward.ranking_losses import REWARD_LOSSES


def group_loss(
    cfg: RewardConfig, scores_BC: Tensor, log_variances_BC: Tensor | None, table: PairTable
) -> tuple[Tensor, dict[str, Tensor]]:
    """Ranking loss over all criteria, plus `cfg.centering` times the centering loss.

    A criterion counts with its weight where a pair of the step has a label for it. `loss/ranking` is the sum, and
    where there are several criteria `loss/ranking.<name>` each of them; `reward/margin` and `reward/accuracy` are over
    all pairs with a preference.
    """
    ranking = centering = scores_BC.new_zeros(())
    figures: dict[str, Tensor] = {}
    for place, (name, weight) in enumerate(cfg.criteria.items()):
        pairs = table.rows(table.criterion_N == place)
        if not len(pairs):
            continue
        scores_B = scores_BC[:, place]
        variances_B = None if log_variances_BC is None else log_variances_BC[:, place].exp()
        part = REWARD_LOSSES[cfg.loss.name].of_step(cfg.loss, scores_B, variances_B, pairs)
        ranking = ranking + weight * part
        centering = centering + centering_of(cfg.loss, scores_B, pairs)
        if len(cfg.criteria) > 1:
            figures[f"loss/ranking.{name}"] = part
    loss = ranking + cfg.centering * centering
    decided = table.rows(~table.tie_N)
    if len(decided):
        margins = score_margins(
            scores_BC[decided.chosen_N, decided.criterion_N], scores_BC[decided.rejected_N, decided.criterion_N]
        )
        figures |= {name: values_N.mean() for name, values_N in margins.items()}
    return loss, {"loss/ranking": ranking, **figures}


def centering_of(cfg: RewardLossConfig, scores_B: Tensor, pairs: PairTable) -> Tensor:
    """Mean squared score, or mean squared sum of a pair's scores."""
    if cfg.center == "pairs":
        return centering_losses(scores_B[pairs.chosen_N], scores_B[pairs.rejected_N]).mean()
    return level_losses(scores_B).mean()


def contrastive_loss(states_BD: Tensor, table: PairTable, temperature: float) -> Tensor:
    """Contrast of the step's winners with its losers (InfoNCE on mean states).

    A winner has won more of its pairs than it lost, over all criteria. Its positive is the mean of the other winners'
    states, its negatives are all losers. A step with fewer than two winners or without a loser asks nothing.
    """
    decided = table.rows(~table.tie_N)
    balance_B = torch.zeros(len(states_BD), device=states_BD.device)
    balance_B.index_add_(0, decided.chosen_N, torch.ones_like(decided.margin_N))
    balance_B.index_add_(0, decided.rejected_N, -torch.ones_like(decided.margin_N))
    winners_ND, losers_MD = states_BD[balance_B > 0], states_BD[balance_B < 0]
    count = len(winners_ND)
    if count < 2 or not len(losers_MD):
        return states_BD.new_zeros(())
    others_ND = (winners_ND.sum(0) - winners_ND) / (count - 1)
    allowed_NM = torch.ones(count, len(losers_MD), device=states_BD.device)
    return contrastive_losses(winners_ND, others_ND, losers_MD, allowed_NM, temperature).mean()
