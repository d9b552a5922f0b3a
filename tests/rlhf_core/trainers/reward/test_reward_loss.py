"""What labels ask of scores, worked by hand: each loss, weights, ties, rankings, criteria, contrast."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from scipy.special import log_ndtr
from scipy.stats import norm
from torch import Tensor

from rlhf_core.config.reward import RewardConfig, RewardEnsembleConfig, RewardLossConfig
from rlhf_core.data.batching.pair_table import PairTable, pair_table
from rlhf_core.data.batching.pairs import PairLabel, PreferenceGroup
from rlhf_core.trainers.reward.loss import contrastive_loss, group_loss
from rlhf_core.trainers.reward.ranking_losses import REWARD_LOSSES


def group(count: int, pairs: Sequence[tuple[int, int]], *labels: PairLabel) -> PreferenceGroup:
    return PreferenceGroup(prompt=[7], responses=[[n] for n in range(count)], pairs=list(pairs), labels=list(labels))


def table(*groups: PreferenceGroup, criteria: Sequence[str] = ("overall",)) -> PairTable:
    return pair_table(groups, criteria)


def nll(delta: float) -> float:
    return math.log1p(math.exp(-delta))


SCORES = torch.tensor([2.0, 0.5, -1.0, 1.0, 0.0])
# Differences 1.5, 3.0, 1.5 in the first group of three responses, -1 in the second of two.
PAIRS = table(
    group(
        3,
        [(0, 1), (0, 2), (1, 2)],
        PairLabel(agreement=0.6, margin=1.0),
        PairLabel(agreement=1.0, margin=3.0),
        PairLabel(agreement=0.8, margin=2.0),
    ),
    group(2, [(1, 0)], PairLabel(agreement=0.5, margin=0.5)),
)
DELTAS, AGREEMENTS, MARGINS = [1.5, 3.0, 1.5, -1.0], [0.6, 1.0, 0.8, 0.5], [1.0, 3.0, 2.0, 0.5]


def loss(scores: Tensor = SCORES, pairs: PairTable = PAIRS, variances: Tensor | None = None, **settings: Any) -> float:
    cfg = RewardLossConfig(**settings)
    return REWARD_LOSSES[cfg.name].of_step(cfg, scores, variances, pairs).item()


def test_bradley_terry_is_the_mean_over_pairs() -> None:
    assert loss() == pytest.approx(sum(map(nll, DELTAS)) / 4)


def test_a_prompt_counts_once_with_its_c_k_2_pairs() -> None:
    """Ouyang et al. 2022, eq. 1: 1 / C(3, 2) for each of three pairs, 1 for the only one."""
    expected = (sum(map(nll, DELTAS[:3])) / 3 + nll(DELTAS[3])) / 2
    assert loss(average="prompt") == pytest.approx(expected)


def test_margin_and_hinge() -> None:
    assert loss(name="margin", margin=0.5) == pytest.approx(sum(nll(d - 0.5) for d in DELTAS) / 4)
    assert loss(name="hinge", margin=2.0) == pytest.approx((0.5 + 0.0 + 0.5 + 3.0) / 4)
    stronger = [0.5 * m for m in MARGINS]
    expected = sum(max(0.0, m - d) for d, m in zip(DELTAS, stronger, strict=True)) / 4
    assert loss(name="hinge", margin=0.5, margin_from="strength") == pytest.approx(expected)
    expected = sum(nll(d - m) for d, m in zip(DELTAS, stronger, strict=True)) / 4
    assert loss(name="margin", margin=0.5, margin_from="strength") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("weights", "by_hand"),
    [
        ("agreement", AGREEMENTS),
        ("strength", MARGINS),
        ("difficulty", [1 / (1 + math.exp(d)) for d in DELTAS]),
    ],
)
def test_weighted_pairs_are_divided_by_their_weights(weights: str, by_hand: list[float]) -> None:
    expected = sum(w * nll(d) for w, d in zip(by_hand, DELTAS, strict=True)) / sum(by_hand)
    assert loss(weights=weights) == pytest.approx(expected)


def test_weights_and_prompts_together() -> None:
    weights = [*(a / 3 for a in AGREEMENTS[:3]), AGREEMENTS[3]]
    expected = sum(w * nll(d) for w, d in zip(weights, DELTAS, strict=True)) / sum(weights)
    assert loss(weights="agreement", average="prompt") == pytest.approx(expected)


def test_pairs_that_weigh_nothing_ask_nothing() -> None:
    nothing = table(group(2, [(0, 1)], PairLabel(margin=0.0)))
    assert loss(pairs=nothing, weights="strength") == 0.0


def test_thurstone_is_the_normal_probability_of_the_difference() -> None:
    variances = torch.tensor([0.5, 1.0, 2.0, 0.25, 0.75])
    spread = [1.5, 2.5, 3.0, 1.0]
    expected = -sum(norm.logcdf(d / math.sqrt(v)) for d, v in zip(DELTAS, spread, strict=True)) / 4
    assert loss(variances=variances, name="thurstone") == pytest.approx(expected, rel=1e-6)
    tied = table(group(2, [(0, 1)], PairLabel(tie=True, margin=0.0)))
    expected = -(log_ndtr(1.5 / math.sqrt(1.5)) + log_ndtr(-1.5 / math.sqrt(1.5))) / 2
    assert loss(pairs=tied, variances=variances, name="thurstone") == pytest.approx(expected, rel=1e-6)


TIED = table(group(2, [(0, 1)]), group(2, [(0, 1)], PairLabel(tie=True, margin=0.0)))
TIED_SCORES = torch.tensor([1.0, 0.0, 0.7, 0.0])  # differences 1 (decided) and 0.7 (tied)


@pytest.mark.parametrize(
    ("settings", "decided"),
    [({}, nll(1.0)), ({"name": "margin"}, nll(0.0)), ({"name": "hinge", "margin": 3.0}, 2.0)],
)
def test_a_tie_is_half_a_win_of_each(settings: dict[str, Any], decided: float) -> None:
    half = (nll(0.7) + nll(-0.7)) / 2
    assert loss(TIED_SCORES, TIED, **settings) == pytest.approx((decided + half) / 2)


def test_rao_and_kupper_give_ties_a_probability() -> None:
    """P(tie) = 1 - sigmoid(delta - eta) - sigmoid(-delta - eta), and a decided pair asks for eta more."""
    eta = 0.4
    tied = 1 - 1 / (1 + math.exp(-(0.7 - eta))) - 1 / (1 + math.exp(0.7 + eta))
    expected = (nll(1.0 - eta) - math.log(tied)) / 2
    assert loss(TIED_SCORES, TIED, ties="rao_kupper", tie_threshold=eta) == pytest.approx(expected)


def test_ties_weigh_like_any_pair() -> None:
    half = (nll(0.7) + nll(-0.7)) / 2
    assert loss(TIED_SCORES, TIED, weights="strength") == pytest.approx((nll(1.0) + half) / 2)
    missed = 1 / (1 + math.exp(1.0))
    expected = (missed * nll(1.0) + 0.5 * half) / (missed + 0.5)
    assert loss(TIED_SCORES, TIED, weights="difficulty") == pytest.approx(expected)


def test_plackett_luce_is_a_likelihood_of_rankings() -> None:
    """Group 1 implies 0 > 1 > 2: two choices; group 2 is a pair, which is Bradley-Terry."""
    first = math.log(sum(math.exp(s) for s in (2.0, 0.5, -1.0))) - 2.0
    second = math.log(math.exp(0.5) + math.exp(-1.0)) - 0.5
    expected = ((first + second) / 2 + nll(-1.0)) / 2
    assert loss(name="plackett_luce", average="prompt") == pytest.approx(expected)


def test_two_rankings_of_a_prompt_are_two() -> None:
    """No pair joins the two: together they are no single order. Each is one, and the prompt is their mean."""
    one, two = PairLabel(rankings=("one",)), PairLabel(rankings=("two",))
    places = [(0, 1), (0, 2), (1, 2), (3, 4)]
    both = table(group(5, places, one, one, one, two), group(2, [(1, 0)]))
    scores = torch.tensor([2.0, 0.5, -1.0, 1.0, 0.0, 3.0, 1.0])
    first = math.log(sum(math.exp(s) for s in (2.0, 0.5, -1.0))) - 2.0
    second = math.log(math.exp(0.5) + math.exp(-1.0)) - 0.5
    expected = (((first + second) / 2 + nll(1.0)) / 2 + nll(-2.0)) / 2
    assert loss(scores, both, name="plackett_luce", average="prompt") == pytest.approx(expected)


def test_a_pair_of_two_rankings_counts_in_both() -> None:
    """0 > 1 > 2 and 0 > 1 > 3 share their first pair; a third, of 2 and 3 alone in a circle's place, stays a pair."""
    one, two, shared = PairLabel(rankings=("one",)), PairLabel(rankings=("two",)), PairLabel(rankings=("one", "two"))
    pairs = table(group(4, [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)], shared, one, one, two, two, PairLabel()))

    def order(*scores: float) -> float:
        left = [scores[place:] for place in range(len(scores) - 1)]
        return sum(math.log(sum(map(math.exp, some))) - some[0] for some in left) / len(left)

    expected = (order(2.0, 0.5, -1.0) + order(2.0, 0.5, 1.0) + nll(-2.0)) / 3
    assert loss(SCORES[:4], pairs, name="plackett_luce", average="prompt") == pytest.approx(expected)


def test_a_ranking_that_is_none_does_not_spoil_the_other() -> None:
    one, two = PairLabel(rankings=("one",)), PairLabel(rankings=("two",))
    pairs = table(group(5, [(0, 1), (1, 2), (2, 0), (3, 4)], two, two, two, one))
    expected = ((nll(1.5) + nll(1.5) + nll(-3.0)) / 3 + nll(1.0)) / 2
    assert loss(pairs=pairs, name="plackett_luce", average="prompt") == pytest.approx(expected)


def test_pairs_that_imply_no_ranking_stay_pairs() -> None:
    circle = table(group(3, [(0, 1), (1, 2), (2, 0)]), group(2, [(1, 0)]))
    expected = ((nll(1.5) + nll(1.5) + nll(-3.0)) / 3 + nll(-1.0)) / 2
    assert loss(pairs=circle, name="plackett_luce", average="prompt") == pytest.approx(expected)
    tied = table(group(3, [(0, 1), (1, 2)], PairLabel(), PairLabel(tie=True)))
    expected = (nll(1.5) + (nll(1.5) + nll(-1.5)) / 2) / 2
    assert loss(SCORES[:3], tied, name="plackett_luce", average="prompt") == pytest.approx(expected)


def test_criteria_are_summed_with_their_weights() -> None:
    """Each is a mean over its own pairs; a criterion without a pair in the step asks nothing, centering included."""
    cfg = RewardConfig(criteria={"helpful": 2.0, "harmless": 0.5, "truthful": 9.0}, centering=0.1)
    labels = [PairLabel(criterion=name) for name in ("helpful", "harmless", "harmless", "other")]
    pairs = table(group(3, [(0, 1), (1, 0), (1, 2), (0, 2)], *labels), criteria=list(cfg.criteria))
    scores = torch.tensor([[1.0, 0.0, 5.0], [0.0, 3.0, 5.0], [0.5, 1.0, 5.0]])
    total, figures = group_loss(cfg, scores, None, pairs)
    helpful, harmless = nll(1.0), (nll(3.0) + nll(2.0)) / 2
    centering = (1 + 0 + 0.25) / 3 + (0 + 9 + 1) / 3
    assert figures["loss/ranking.helpful"].item() == pytest.approx(helpful)
    assert figures["loss/ranking.harmless"].item() == pytest.approx(harmless)
    assert "loss/ranking.truthful" not in figures
    assert figures["loss/ranking"].item() == pytest.approx(2.0 * helpful + 0.5 * harmless)
    assert total.item() == pytest.approx(2.0 * helpful + 0.5 * harmless + 0.1 * centering)
    assert figures["reward/margin"].item() == pytest.approx((1.0 + 3.0 + 2.0) / 3)


def test_centering_of_scores_and_of_pairs() -> None:
    pairs = table(group(3, [(0, 1), (0, 2)]))
    scores = torch.tensor([[1.0], [2.0], [3.0]])
    ranking = (nll(-1.0) + nll(-2.0)) / 2
    for center, expected in (("scores", 14 / 3), ("pairs", (9 + 16) / 2)):
        cfg = RewardConfig(centering=0.01, loss=RewardLossConfig(center=center))
        assert group_loss(cfg, scores, None, pairs)[0].item() == pytest.approx(ranking + 0.01 * expected)


def test_contrast_of_winners_with_losers() -> None:
    """Winners 0 and 3, losers 1 and 4; response 2 has won and lost. Cosines of unit vectors, temperature 0.5."""
    angles = torch.tensor([0.0, 90.0, 45.0, 30.0, 180.0]).deg2rad()
    states = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([[1.0], [2.0], [3.0], [4.0], [0.5]])
    pairs = table(group(3, [(0, 2), (2, 1)]), group(2, [(0, 1)]))

    def cosine(one: float, other: float) -> float:
        return math.cos(math.radians(one - other)) / 0.5

    expected = 0.0
    for anchor, positive in ((0.0, 30.0), (30.0, 0.0)):
        terms = [cosine(anchor, positive), cosine(anchor, 90.0), cosine(anchor, 180.0)]
        expected += (math.log(sum(map(math.exp, terms))) - terms[0]) / 2
    assert contrastive_loss(states, pairs, 0.5).item() == pytest.approx(expected, rel=1e-5)
    assert contrastive_loss(states[:2], table(group(2, [(0, 1)])), 0.5).item() == 0.0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loss": {"name": "hinge", "ties": "rao_kupper"}}, "ties 'rao_kupper' extends"),
        ({"loss": {"name": "plackett_luce"}}, "set average to prompt"),
        ({"alpha": 0.5}, "set head to mixed"),
        ({"criteria": {}}, "at least 1 item"),
        ({"criteria": {"overall": 0.0}}, "greater than 0"),
        ({"ensemble": {"aggregate": "median"}}, "set members above 1"),
        ({"ensemble": {"distill": "scores"}}, "set members above 1"),
        ({"ensemble": {"members": 3, "aggregate": "accuracy", "resample": "none"}}, "set resample to bootstrap"),
        ({"ensemble": {"aggregate": "pessimistic"}}, "needs a deviation"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        RewardConfig.model_validate(settings)
    assert RewardEnsembleConfig(members=3, aggregate="accuracy").resample == "bootstrap"
