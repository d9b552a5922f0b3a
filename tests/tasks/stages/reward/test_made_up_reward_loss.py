"""A reward loss that the registry is given by a test trains a reward model, without any other edit."""

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from rlhf_core.config.reward import REWARD_LOSS_ROWS, RewardLossConfig, RewardLossName, RewardLossRow
from rlhf_core.data.batching.pair_table import PairTable
from rlhf_core.models.scoring.ensemble import load_reward_model
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.state.atomic import tree_digest
from rlhf_core.trainers.reward.ranking_losses import REWARD_LOSSES, ListwiseLoss, PairwiseLoss, ScoredPairs
from tasks.frame.process import run_stage
from tasks.params import load_params
from tasks.stages.reward import run as reward


def model_by(project: Path, loss: str) -> dict[str, str]:
    params = load_params(project / "params.yaml")
    named = params.reward.loss.model_copy(update={"name": loss})
    params = params.model_copy(update={"reward": params.reward.model_copy(update={"loss": named})})
    assert run_stage("reward", reward.run, params, project) == 0
    return tree_digest(project / "artifacts/reward/model")


def logistic(cfg: RewardLossConfig, scored: ScoredPairs) -> torch.Tensor:
    return -F.logsigmoid(scored.chosen_N - scored.rejected_N)


def squared(cfg: RewardLossConfig, scored: ScoredPairs) -> torch.Tensor:
    assert scored.variances is not None
    spread_N = scored.variances[0] + scored.variances[1]
    return (scored.chosen_N - scored.rejected_N - cfg.margin).square() / spread_N + spread_N.log()


def test_pairwise_losses_of_the_registry_alone(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is Bradley-Terry written anew and trains the same weights, the other learns variances."""
    expected = model_by(project, "bradley_terry")
    monkeypatch.setitem(REWARD_LOSSES, "logistic", PairwiseLoss(row=RewardLossRow(docs="anew"), decided=logistic))
    assert model_by(project, "logistic") == expected
    spread = RewardLossRow(docs="(Δ - m)² in units of its variance", has_variance=True)
    monkeypatch.setitem(REWARD_LOSSES, "squared", PairwiseLoss(row=spread, decided=squared))
    assert model_by(project, "squared") != expected
    model = load_reward_model(project / "artifacts/reward/model")
    assert isinstance(model, RewardModel)
    assert model.spec.spread


def test_a_listwise_loss_of_the_registry_alone(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mean_gap(scores_B: torch.Tensor, pairs: PairTable) -> torch.Tensor:
        return -(scores_B[pairs.chosen_N] - scores_B[pairs.rejected_N]).tanh().mean()

    row = RewardLossRow(docs="mean of tanh Δ", of_rankings=True)
    monkeypatch.setitem(REWARD_LOSSES, "gap", ListwiseLoss(row=row, of_rankings=mean_gap))
    model_by(project, "gap")
    told = json.loads((project / "reports/metrics/reward.json").read_text())
    assert set(told["rankings"]) == {"num_read", "num_as_pairs"}


def test_every_reward_loss_of_the_schema_is_there() -> None:
    assert list(REWARD_LOSSES) == list(REWARD_LOSS_ROWS) == list(get_args(RewardLossName))
    assert all(REWARD_LOSSES[name].row is row for name, row in REWARD_LOSS_ROWS.items())
