"""Toy models and a place where checkpoints are kept, for the tests of the trainers."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from support.ppo import EOS, PAD, TINY, VOCABULARY
from transformers import PreTrainedModel

from rlhf_core.config.reward import RewardConfig
from rlhf_core.models.policy import build_policy
from rlhf_core.state.checkpoint import Checkpointer
from rlhf_core.state.rng import StepRng
from rlhf_core.state.train_state import TrainState
from rlhf_core.trainers.optimisation import make_optimizer
from rlhf_core.trainers.reward.plan import make_models


@dataclass
class Sink:
    """Notes what a trainer reports."""

    rows: list[tuple[int, int, Mapping[str, float], int]] = field(default_factory=list)

    def __call__(self, step: int, total: int, metrics: Mapping[str, float], tokens: int) -> None:
        self.rows.append((step, total, dict(metrics), tokens))


class Stop(Exception):
    """A run that is broken off."""


@dataclass
class Harness:
    """Runs a trainer unbroken, or broken off after some step and resumed in a fresh state from its checkpoints."""

    folder: Path
    make_state: Callable[[], TrainState]
    train: Callable[[TrainState, Callable, Callable], TrainState]

    def unbroken(self) -> TrainState:
        return self.train(self.make_state(), Sink(), lambda state: None)

    def resumed_after(self, step: int) -> TrainState:
        checkpointer = Checkpointer(self.folder / f"after-{step}", {"test": "resume"})

        def log(done: int, total: int, metrics: Mapping[str, float], tokens: int) -> None:
            if done == step:
                raise Stop

        with pytest.raises(Stop):
            self.train(self.make_state(), log, checkpointer.save)
        state = self.make_state()
        assert checkpointer.restore(state)
        assert state.step <= step
        return self.train(state, Sink(), checkpointer.save)


def assert_same_state(first: TrainState, second: TrainState) -> None:
    """Weights, moments, counters and history, bit for bit."""
    assert first.step == second.step
    assert first.history == second.history
    assert first.extra == second.extra
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[name]), name
    for name, module in first.modules.items():
        other = second.modules[name].state_dict()
        for key, value in module.state_dict().items():
            assert torch.equal(value, other[key]), f"{name}.{key}"
    for name, optimizer in first.optimizers.items():
        one, two = optimizer.state_dict(), second.optimizers[name].state_dict()
        assert one["param_groups"] == two["param_groups"]
        for index, entry in one["state"].items():
            for key, value in entry.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(two["state"][index][key])), f"{name} {key}"


@pytest.fixture(scope="session")
def _built() -> PreTrainedModel:
    return build_policy(TINY, VOCABULARY, PAD, EOS, seed=1)


@pytest.fixture
def tiny_policy(_built: PreTrainedModel) -> Callable[[], PreTrainedModel]:
    """Makes equal small policies."""
    return lambda: copy.deepcopy(_built)


@pytest.fixture
def make_reward_state(tiny_policy: Callable[[], PreTrainedModel]) -> Callable[[RewardConfig], TrainState]:
    """Makes the models of a reward run, untrained, with their optimisers."""

    def make(cfg: RewardConfig) -> TrainState:
        models = make_models(cfg, tiny_policy(), StepRng(0, "reward"))
        return TrainState(
            modules=dict(models),
            optimizers={name: make_optimizer(model, cfg.learning_rate, 0.01) for name, model in models.items()},
        )

    return make


@pytest.fixture
def sink() -> Sink:
    return Sink()


@pytest.fixture
def same_state() -> Callable[[TrainState, TrainState], None]:
    return assert_same_state


@pytest.fixture
def harness(tmp_path: Path) -> Callable[..., Harness]:
    return lambda make_state, train: Harness(tmp_path, make_state, train)
