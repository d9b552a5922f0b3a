"""The reward trainer: it learns, resumes to the bit, scores shared responses once and survives bad numbers."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf_core.config import RewardConfig
from rlhf_core.data.batching.pair_table import pair_table
from rlhf_core.data.batching.pairs import PreferenceGroup, PreferencePair, collate_groups, group_batches, group_pairs
from rlhf_core.engine.batches import SequenceBatch
from rlhf_core.errors import Diverged, GateRefused
from rlhf_core.models.scoring.reward_model import RewardModel, RewardOutput
from rlhf_core.state.run_context import RunContext
from rlhf_core.state.train_state import TrainState
from rlhf_core.trainers.optimisation import make_optimizer
from rlhf_core.trainers.reward.loss import group_loss
from rlhf_core.trainers.reward.trainer import standardise, train_reward

PAD, EOS, GOOD, BAD = 0, 1, 5, 6


def toy_pairs(count: int, seed: int) -> list[PreferencePair]:
    """The chosen response holds GOOD somewhere and the rejected one BAD; the rest is noise of any length."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, number: int) -> list[int]:
        return torch.randint(low, high, (number,), generator=generator).tolist()

    pairs = []
    for _ in range(count):
        sides = []
        for token in (GOOD, BAD):
            noise = draw(7, 24, draw(1, 6, 1)[0])
            place = draw(0, len(noise) + 1, 1)[0]
            sides.append([*noise[:place], token, *noise[place:], EOS])
        pairs.append(PreferencePair(prompt=draw(7, 24, draw(1, 7, 1)[0]), chosen=sides[0], rejected=sides[1]))
    return pairs


@pytest.fixture
def make_state(tiny_policy: Callable[[], PreTrainedModel]) -> Callable[..., TrainState]:
    def make(head: Any = "last") -> TrainState:
        model = RewardModel.from_policy(tiny_policy(), head, seed=3)
        return TrainState(modules={"reward": model}, optimizers={"reward": make_optimizer(model, 1e-3, 0.01)})

    return make


def accuracy(model: nn.Module, pairs: list[PreferencePair]) -> float:
    batch, chosen_N, rejected_N = collate_groups(group_pairs(pairs), PAD)
    with torch.no_grad():
        scores_B = model(batch)
    return (scores_B[chosen_N] > scores_B[rejected_N]).float().mean().item()


@pytest.mark.parametrize("head", ["last", "mean", "attention", "mixed", "sum", "gated"])
def test_it_learns_a_preference_it_can_see(make_state: Callable[..., TrainState], sink: Any, head: str) -> None:
    cfg = RewardConfig(epochs=3, prompts_per_step=16, learning_rate=5e-3, warmup_steps=5)
    state = make_state(head)
    groups = group_pairs(toy_pairs(240, seed=1))
    train_reward(cfg, state, groups, RunContext(seed=0, pad_id=PAD, log=sink))
    assert accuracy(state.modules["reward"], toy_pairs(200, seed=2)) > 0.9
    assert state.history[-1]["loss/ranking"] < 0.3 < state.history[0]["loss/ranking"]
    assert [row[0] for row in sink.rows] == list(range(1, sink.rows[-1][1] + 1))
    assert [row["step"] for row in state.history] == [row[0] for row in sink.rows]


@pytest.mark.parametrize("step", [1, 3, 4, 7])
def test_broken_off_and_resumed_it_ends_with_the_same_bits(
    make_state: Callable[..., TrainState], harness: Callable[..., Any], same_state: Callable[..., None], step: int
) -> None:
    cfg = RewardConfig(epochs=2, prompts_per_step=8, warmup_steps=2, save_every=1 if step == 1 else 3)
    groups = group_pairs(toy_pairs(30, seed=4))

    def train(state: TrainState, log: Any, checkpoint: Any) -> TrainState:
        return train_reward(cfg, state, groups, RunContext(seed=0, pad_id=PAD, log=log, checkpoint=checkpoint)).state

    runs = harness(make_state, train)
    same_state(runs.resumed_after(step), runs.unbroken())


def test_every_group_comes_once_in_a_mixture_of_its_seed() -> None:
    groups = group_pairs(toy_pairs(50, seed=1))
    mixtures = [group_batches(groups, 8, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    for batches in mixtures:
        assert sorted(index for batch in batches for index in batch) == list(range(len(groups)))
    assert mixtures[0] == mixtures[1] != mixtures[2]


def test_each_epoch_mixes_the_groups_anew(make_state: Callable[..., TrainState], sink: Any) -> None:
    """Same tokens in sum, other tokens step by step."""
    cfg = RewardConfig(epochs=2, prompts_per_step=8)
    groups = group_pairs(toy_pairs(64, seed=1))
    train_reward(cfg, make_state(), groups, RunContext(seed=0, pad_id=PAD, log=sink))
    totals = [0, *(row[3] for row in sink.rows)]
    tokens = [after - before for before, after in itertools.pairwise(totals)]
    half = len(tokens) // 2
    assert sum(tokens[:half]) == sum(tokens[half:])
    assert sorted(tokens[:half]) != sorted(tokens[half:])


def test_shared_responses_are_scored_once() -> None:
    pairs = [
        PreferencePair(prompt=[7], chosen=[8, EOS], rejected=[9, EOS]),
        PreferencePair(prompt=[7, 7], chosen=[9, EOS], rejected=[8, EOS]),
        PreferencePair(prompt=[7], chosen=[8, EOS], rejected=[10, EOS]),
        PreferencePair(prompt=[7], chosen=[10, EOS], rejected=[9, EOS]),
    ]
    groups = group_pairs(pairs)
    assert groups == [
        PreferenceGroup(prompt=[7], responses=[[8, EOS], [9, EOS], [10, EOS]], pairs=[(0, 1), (0, 2), (2, 1)]),
        PreferenceGroup(prompt=[7, 7], responses=[[9, EOS], [8, EOS]], pairs=[(0, 1)]),
    ]
    batch, chosen_N, rejected_N = collate_groups(groups, PAD)
    assert batch.response_ids_BR[:, 0].tolist() == [8, 9, 10, 9, 8]
    assert (chosen_N.tolist(), rejected_N.tolist()) == ([0, 0, 2, 3], [1, 2, 1, 4])


def test_the_loss_is_the_ranking_plus_the_centering() -> None:
    cfg = RewardConfig(centering=0.5)
    scores_BC = torch.tensor([[2.0], [0.0]])
    table = pair_table([PreferenceGroup(prompt=[7], responses=[[8], [9]], pairs=[(0, 1)])], ["overall"])
    loss, figures = group_loss(cfg, scores_BC, None, table)
    ranking = torch.log1p(torch.exp(torch.tensor(-2.0))).item()
    assert figures["loss/ranking"].item() == pytest.approx(ranking)
    assert loss.item() == pytest.approx(ranking + 0.5 * 2.0)


def test_three_bad_steps_in_a_row_end_the_run(
    make_state: Callable[..., TrainState], sink: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make_state()
    model, calls, before = state.modules["reward"], [], {}
    read = RewardModel.read

    def broken(self: RewardModel, batch: SequenceBatch, beside: Any) -> RewardOutput:
        calls.append(1)
        reading = read(self, batch, beside)
        return reading._replace(scores_BC=reading.scores_BC * (float("nan") if len(calls) in (2, 4, 5, 6) else 1.0))

    monkeypatch.setattr(RewardModel, "read", broken)
    cfg = RewardConfig(epochs=4, prompts_per_step=8)

    def checkpoint(_: TrainState) -> None:
        raise AssertionError("nothing is saved here")

    def log(step: int, total: int, metrics: dict[str, float], tokens: int) -> None:
        sink(step, total, metrics, tokens)
        before[step] = model.head.scalar.weight.detach().clone()

    groups = group_pairs(toy_pairs(30, seed=4))
    with pytest.raises(Diverged, match=r"step 6"):
        train_reward(cfg, state, groups, RunContext(seed=0, pad_id=PAD, log=log, checkpoint=checkpoint))
    assert torch.equal(before[1], before[2]), "a step on a NaN is not taken"
    assert not torch.equal(before[2], before[3])
    assert "loss/train" not in sink.rows[1][2]
    assert sink.rows[1][2]["optim/not_finite"] > 0
    assert sink.rows[2][2]["optim/not_finite"] == 0


def test_standardised_scores_have_mean_0_and_deviation_1(make_state: Callable[..., TrainState]) -> None:
    model = make_state("sum").modules["reward"]
    batch, _, _ = collate_groups(group_pairs(toy_pairs(40, seed=1)), PAD)
    with torch.no_grad():
        standardise(model, model(batch).tolist())
        scores = model(batch)
    assert scores.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert scores.std(correction=0).item() == pytest.approx(1.0, abs=1e-5)


def test_a_model_that_tells_nothing_apart_is_refused(make_state: Callable[..., TrainState]) -> None:
    with pytest.raises(GateRefused, match="same score"):
        standardise(make_state("gated").modules["reward"], [0.0, 0.0, 0.0])
