"""Ensembles: each aggregation by hand, deviations, ranks, weights, folders."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from scipy.stats import percentileofscore
from torch import Tensor

from rlhf_core.config import ModelConfig
from rlhf_core.engine.batches import SequenceBatch, collate
from rlhf_core.errors import ConfigError, EnvironmentProblem
from rlhf_core.models.policy import build_policy
from rlhf_core.models.scoring.ensemble import (
    Aggregate,
    RewardEnsemble,
    accuracy_weights,
    load_reward_model,
    ranks_among,
    tokenizer_folder,
    total_deviation,
)
from rlhf_core.models.scoring.heads import HeadSpec
from rlhf_core.models.scoring.reward_model import Details, RewardModel
from rlhf_core.state.atomic import tree_digest
from rlhf_core.text.tokenizer import load_tokenizer, train_tokenizer

CFG = ModelConfig(hidden_size=16, heads=2, layers=1, intermediate_size=16, init_std=0.5)
BATCH = collate([[11, 12], [13]], [[2, 3, 5], [7]], pad_id=0)


class Said(RewardModel):
    """A member that says what it is told to say."""

    def __init__(self, scores: Sequence[float], deviations: Sequence[float] | None = None) -> None:
        torch.nn.Module.__init__(self)
        self.scores, self.deviations = scores, deviations

    def details(self, batch: SequenceBatch) -> Details:
        return Details(torch.tensor(self.scores), None if self.deviations is None else torch.tensor(self.deviations))


def members(count: int, *, spread: bool = False) -> list[RewardModel]:
    policy = build_policy(CFG, 270, 0, 1, seed=0)
    return [RewardModel.from_policy(policy, HeadSpec(kind="mean", spread=spread), seed) for seed in range(count)]


def score(
    aggregate: Aggregate, *said: Sequence[float], pessimism: float = 1.0, weights: Sequence[float] = ()
) -> Tensor:
    ensemble = RewardEnsemble([Said(one) for one in said], aggregate, pessimism)
    if weights:
        ensemble.weights_M = torch.tensor(weights)
    return ensemble.raw_scores(BATCH)


def test_mean_and_median_and_weighted_mean() -> None:
    said = [1.0, 0.0], [2.0, 0.0], [9.0, 6.0]
    assert score("mean", *said).tolist() == [4.0, 2.0]
    assert score("median", *said).tolist() == [2.0, 0.0]
    assert score("median", *said[:2]).tolist() == [1.5, 0.0], "between two, the middle"
    assert score("accuracy", *said, weights=[0.5, 0.5, 0.0]).tolist() == [1.5, 0.0]


def test_pessimistic_takes_deviations_off_the_mean() -> None:
    """Variances over members, divided by M - 1: ((1-4)^2 + (2-4)^2 + (9-4)^2) / 2 = 19; 12."""
    expected = [4.0 - 2.0 * math.sqrt(19.0), 2.0 - 2.0 * math.sqrt(12.0)]
    found = score("pessimistic", [1.0, 0.0], [2.0, 0.0], [9.0, 6.0], pessimism=2.0)
    assert found.tolist() == pytest.approx(expected)


def test_total_deviation_joins_disagreement_and_own_doubt() -> None:
    scores, own = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.5], [2.0]])
    assert total_deviation(scores, None).item() == pytest.approx(statistics.stdev([1.0, 3.0]))
    assert total_deviation(scores, own).item() == pytest.approx(math.sqrt(2.0 + (0.25 + 4.0) / 2))
    assert total_deviation(scores[:1], own[:1]).item() == pytest.approx(0.5), "one member does not disagree"


def test_details_are_on_the_scale_of_the_scores() -> None:
    ensemble = RewardEnsemble([Said([1.0, 0.0]), Said([3.0, 0.0])], "mean")
    ensemble.standardise(1.0, 4.0)
    details = ensemble.details(BATCH)
    assert details.scores_B.tolist() == [0.25, -0.25]
    assert details.deviations_B.tolist() == pytest.approx([2.0**0.5 / 4.0, 0.0])
    assert details.members_MB.tolist() == [[1.0, 0.0], [3.0, 0.0]]
    assert torch.equal(ensemble(BATCH), details.scores_B)
    with pytest.raises(ValueError, match="scores everything alike"):
        ensemble.standardise(0.0, 0.0)


def test_a_vote_is_the_mean_of_ranks() -> None:
    """Four references each: ranks 0, 1/3, 2/3, 1. Member scales do not count."""
    ensemble = RewardEnsemble([Said([2.0, 9.0]), Said([250.0, -1.0])], "vote")
    ensemble.reference_MQ = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 100.0, 200.0, 300.0]])
    assert ensemble.raw_scores(BATCH).tolist() == pytest.approx([(1 / 3 + 2.5 / 3) / 2, (1.0 + 0.0) / 2])
    spread = (
        torch.tensor([1.0, 2.0, 3.0, 4.0]).std(correction=0)
        + 100 * torch.tensor([1.0, 2.0, 3.0, 4.0]).std(correction=0)
    ) / 2
    assert ensemble.unit.item() == pytest.approx(spread.item())


def test_ranks_agree_with_scipy_on_the_references_themselves() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(2, 50, generator=generator).sort(1).values
    ranks = ranks_among(reference, reference)
    for row, found in zip(reference, ranks, strict=True):
        expected = [percentileofscore(row.numpy(), one, kind="strict") / 100 * 50 / 49 for one in row.numpy()]
        assert found.tolist() == pytest.approx(expected, abs=1e-6)
    inside = torch.linspace(-1.5, 1.5, 100).repeat(2, 1)
    assert (ranks_among(inside, reference).diff(dim=1) > 0).all(), "scores apart stay apart"
    equal = ranks_among(torch.tensor([[1.0, 2.0]]), torch.ones(1, 3))
    assert equal.isfinite().all()


def test_weights_are_log_odds_of_the_accuracies() -> None:
    """Shares drawn half a pair toward chance: (0.8 * 99 + 0.5) / 100 = 0.797, and so on; chance weighs nothing."""
    found = accuracy_weights([0.8, 0.9, 0.5, 0.3], [99] * 4)
    odds = [math.log(0.797 / 0.203), math.log(0.896 / 0.104)]
    assert found == pytest.approx([odds[0] / sum(odds), odds[1] / sum(odds), 0.0, 0.0])
    assert accuracy_weights([0.4, 0.5], [9, 0]) == [0.5, 0.5]
    assert math.isfinite(accuracy_weights([1.0, 0.6], [10, 10])[0])


@pytest.mark.parametrize("aggregate", ["mean", "accuracy", "median", "vote", "pessimistic"])
def test_an_ensemble_is_saved_whole(tmp_path: Path, aggregate: Aggregate) -> None:
    tokenizer = train_tokenizer(["some words"], 270)
    ensemble = RewardEnsemble(members(3, spread=aggregate == "mean"), aggregate, pessimism=0.5).eval()
    ensemble.weights_M = torch.tensor([0.2, 0.3, 0.5])
    ensemble.reference_MQ = torch.linspace(-1, 1, 5).repeat(3, 1)
    ensemble.standardise(0.25, 1.5)
    ensemble.save(tmp_path / "one", tokenizer)
    loaded = load_reward_model(tmp_path / "one")
    assert isinstance(loaded, RewardEnsemble)
    assert loaded.body is loaded.members[0].body
    with torch.no_grad():
        for found, expected in zip(loaded.details(BATCH), ensemble.details(BATCH), strict=True):
            assert (found is None and expected is None) or torch.equal(found, expected)
    loaded.save(tmp_path / "two", tokenizer)
    assert tree_digest(tmp_path / "one") == tree_digest(tmp_path / "two")
    assert load_tokenizer(tokenizer_folder(tmp_path / "one")).vocab_size == tokenizer.vocab_size
    assert tokenizer_folder(tmp_path / "one/member-1") == tmp_path / "one/member-1"
    member = load_reward_model(tmp_path / "one/member-1")
    assert isinstance(member, RewardModel)
    assert torch.equal(member(BATCH), ensemble.members[1](BATCH))


def test_a_broken_folder_is_refused(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["some words"], 270)
    RewardEnsemble(members(2), "mean").save(tmp_path, tokenizer)
    (tmp_path / "member-1/reward_head.json").unlink()
    with pytest.raises(EnvironmentProblem, match=r"member-1: missing reward_head.json"):
        load_reward_model(tmp_path)
    (tmp_path / "reward_ensemble.json").write_text('{"aggregate": "best"}')
    with pytest.raises(ConfigError, match="aggregate: 'best' is none"):
        load_reward_model(tmp_path)
