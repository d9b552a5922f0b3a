"""The losses that `reward.loss.name` may name: what one criterion's pairs of a step ask of its scores.

Their rows (`rlhf_core.config.reward.REWARD_LOSS_ROWS`) say the rest. Shape suffixes: B = responses of a step,
N = pairs, G = rankings, K = places of one, U = groups of pairs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_core.config.reward import REWARD_LOSS_ROWS, RewardLossConfig, RewardLossName, RewardLossRow
from rlhf_core.data.batching.pair_table import PairTable, implied_ranking, rankings_apart
from rlhf_core.objectives.ranking import (
    all_pairs_weights,
    bradley_terry_losses,
    margin_losses,
    plackett_luce_losses,
    tie_losses,
)
from rlhf_core.objectives.uncertainty import distilled_pair_losses, gaussian_pair_losses

LEAST_WEIGHT = 1e-8  # total of a step in which no pair weighs anything


class ScoredPairs(NamedTuple):
    """The scores of N pairs; variances where the model learns them."""

    chosen_N: Tensor
    rejected_N: Tensor
    margin_N: Tensor | float
    variances: tuple[Tensor, Tensor] | None


def half_a_win_each(cfg: RewardLossConfig, scored: ScoredPairs) -> Tensor:
    """A tie as half a win of each side, in log-odds also beside losses that would not move it themselves."""
    half_N = torch.full_like(scored.chosen_N, 0.5)
    return distilled_pair_losses(scored.chosen_N, scored.rejected_N, half_N)


@dataclass(frozen=True, kw_only=True, slots=True)
class PairwiseLoss:
    """A loss on each pair; a step's is their weighted mean over pairs or over prompts.

    Attributes:
        row: what is known without scores.
        decided: of pairs with a preference, losses_N.
        tied: of pairs without, losses_N.
    """

    row: RewardLossRow
    decided: Callable[[RewardLossConfig, ScoredPairs], Tensor]
    tied: Callable[[RewardLossConfig, ScoredPairs], Tensor] = half_a_win_each

    def of_step(self, cfg: RewardLossConfig, scores_B: Tensor, variances_B: Tensor | None, pairs: PairTable) -> Tensor:
        """The loss of one criterion's pairs."""
        losses_N = self.of_pairs(cfg, scores_B, variances_B, pairs)
        weights_N = pair_weights(cfg, scores_B, pairs)
        return (weights_N * losses_N).sum() / weights_N.sum().clamp_min(LEAST_WEIGHT)

    def of_pairs(self, cfg: RewardLossConfig, scores_B: Tensor, variances_B: Tensor | None, pairs: PairTable) -> Tensor:
        """The loss of each pair, losses_N."""
        scored = ScoredPairs(
            scores_B[pairs.chosen_N],
            scores_B[pairs.rejected_N],
            cfg.margin * pairs.margin_N if cfg.margin_from == "strength" else cfg.margin,
            None if variances_B is None else (variances_B[pairs.chosen_N], variances_B[pairs.rejected_N]),
        )
        losses_N = self.decided(cfg, scored)
        return torch.where(pairs.tie_N, self.tied(cfg, scored), losses_N) if pairs.tie_N.any() else losses_N


@dataclass(frozen=True, kw_only=True, slots=True)
class ListwiseLoss:
    """A loss on the rankings that a step's pairs imply.

    Attributes:
        row: what is known without scores.
        of_rankings: of a step's scores and pairs, one number.
    """

    row: RewardLossRow
    of_rankings: Callable[[Tensor, PairTable], Tensor]

    def of_step(self, cfg: RewardLossConfig, scores_B: Tensor, variances_B: Tensor | None, pairs: PairTable) -> Tensor:
        """The loss of one criterion's pairs; it reads neither settings nor variances."""
        return self.of_rankings(scores_B, pairs)


@torch.no_grad()
def pair_weights(cfg: RewardLossConfig, scores_B: Tensor, pairs: PairTable) -> Tensor:
    """What each pair counts, weights_N. A tie has no strength and no wrong side: there it counts as much as any."""
    match cfg.weights:
        case "none":
            weights_N = torch.ones_like(pairs.margin_N)
        case "agreement":
            weights_N = pairs.agreement_N
        case "strength":
            weights_N = pairs.margin_N.masked_fill(pairs.tie_N, 1.0)
        case "difficulty":
            missed_N = torch.sigmoid(scores_B[pairs.rejected_N] - scores_B[pairs.chosen_N])
            weights_N = missed_N.masked_fill(pairs.tie_N, 0.5)
    return weights_N * all_pairs_weights(pairs.group_N) if cfg.average == "prompt" else weights_N


def _bradley_terry(cfg: RewardLossConfig, scored: ScoredPairs) -> Tensor:
    """With `ties: rao_kupper` the threshold below which people see no difference is a margin."""
    least = cfg.tie_threshold if cfg.ties == "rao_kupper" else 0.0
    return bradley_terry_losses(scored.chosen_N, scored.rejected_N, least)[0]


def _bradley_terry_ties(cfg: RewardLossConfig, scored: ScoredPairs) -> Tensor:
    if cfg.ties == "rao_kupper":
        return tie_losses(scored.chosen_N, scored.rejected_N, cfg.tie_threshold)
    return half_a_win_each(cfg, scored)


def _thurstone(cfg: RewardLossConfig, scored: ScoredPairs) -> Tensor:
    """Without variances (a distilled student has none) it is Bradley-Terry."""
    if scored.variances is None:
        return _bradley_terry(cfg, scored)
    return gaussian_pair_losses(scored.chosen_N, scored.rejected_N, *scored.variances)


def _thurstone_ties(cfg: RewardLossConfig, scored: ScoredPairs) -> Tensor:
    """Half a win of each side, in its own probabilities."""
    if scored.variances is None:
        return half_a_win_each(cfg, scored)
    one, other = scored.variances
    return 0.5 * (
        gaussian_pair_losses(scored.chosen_N, scored.rejected_N, one, other)
        + gaussian_pair_losses(scored.rejected_N, scored.chosen_N, other, one)
    )


def plackett_luce_loss(scores_B: Tensor, pairs: PairTable) -> Tensor:
    """Mean over prompts of the mean over their rankings of the negative log-likelihood a choice, that is over K - 1.

    A ranking that its pairs do not imply (a circle, a tie, too few comparisons) counts as the mean of its pairs'
    Bradley-Terry losses, which is the same where K = 2. Pairs that come from no ranking are read as one of the prompt.
    """
    device = scores_B.device
    pairs = pairs.to("cpu")  # which pairs are a ranking is found step by step: on a GPU each would wait for the last
    apart, share_U = rankings_apart(pairs)
    rankings, rest = split_rankings(apart)
    total = scores_B.new_zeros(())
    if rankings:
        orders = list(rankings.values())
        places = max(map(len, orders))
        rows_GK = torch.tensor([order + [0] * (places - len(order)) for order in orders], device=device)
        sizes_G = torch.tensor([len(order) for order in orders], device=device)
        mask_GK = (torch.arange(places, device=device) < sizes_G[:, None]).float()
        losses_G = plackett_luce_losses(scores_B[rows_GK], mask_GK) / (sizes_G - 1)
        total = total + (share_U[list(rankings)].to(device) * losses_G).sum()
    if len(rest):
        weights_N = (share_U[rest.group_N] * all_pairs_weights(rest.group_N)).to(device)
        total = total + (weights_N * _BRADLEY_TERRY.of_pairs(RewardLossConfig(), scores_B, None, rest.to(device))).sum()
    return total / len(pairs.group_N.unique())


def split_rankings(pairs: PairTable) -> tuple[dict[int, list[int]], PairTable]:
    """By group the ranking that its pairs imply, best response first, and the pairs of the groups that imply none."""
    rankings: dict[int, list[int]] = {}
    rest_N = torch.ones_like(pairs.tie_N)
    for group in pairs.group_N.unique().tolist():
        own_N = pairs.group_N == group
        own = pairs.rows(own_N)
        better_worse = list(zip(own.chosen_N.tolist(), own.rejected_N.tolist(), strict=True))
        ranking = None if own.tie_N.any() else implied_ranking(better_worse)
        if ranking:
            rankings[group] = ranking
            rest_N &= ~own_N
    return rankings, pairs.rows(rest_N)


_BRADLEY_TERRY = PairwiseLoss(row=REWARD_LOSS_ROWS["bradley_terry"], decided=_bradley_terry, tied=_bradley_terry_ties)
REWARD_LOSSES: Mapping[RewardLossName, PairwiseLoss | ListwiseLoss] = {
    "bradley_terry": _BRADLEY_TERRY,
    "margin": PairwiseLoss(
        row=REWARD_LOSS_ROWS["margin"],
        decided=lambda cfg, scored: bradley_terry_losses(scored.chosen_N, scored.rejected_N, scored.margin_N)[0],
    ),
    "hinge": PairwiseLoss(
        row=REWARD_LOSS_ROWS["hinge"],
        decided=lambda cfg, scored: margin_losses(scored.chosen_N, scored.rejected_N, scored.margin_N)[0],
    ),
    "thurstone": PairwiseLoss(row=REWARD_LOSS_ROWS["thurstone"], decided=_thurstone, tied=_thurstone_ties),
    "plackett_luce": ListwiseLoss(row=REWARD_LOSS_ROWS["plackett_luce"], of_rankings=plackett_luce_loss),
}
