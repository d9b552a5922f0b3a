"""Adapters under every trainer: they learn, the weights beside them keep their bits, and a broken-off run resumes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.ppo import CFG, changed, run, tiny_policy
from support.preference import PAD, in_processes, toy_groups
from torch import Tensor, nn

from rlhf_core.config import DPOConfig, RewardConfig, SFTConfig
from rlhf_core.config.lora import LoraConfig
from rlhf_core.config.sft import HardExamplesConfig
from rlhf_core.data.batching.examples import Example
from rlhf_core.models.adapters import adapted_layers, add_adapters
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.models.scoring.value import ValueModel
from rlhf_core.state.run_context import RunContext
from rlhf_core.state.train_state import TrainState
from rlhf_core.state.world import ALONE
from rlhf_core.trainers.optimisation import make_optimizer
from rlhf_core.trainers.preference.trainer import train_dpo
from rlhf_core.trainers.reward.trainer import train_reward
from rlhf_core.trainers.sft import train_sft

KINDS = {"lora": LoraConfig(rank=4, alpha=8), "dora": LoraConfig(rank=4, alpha=6, use_dora=True, use_rslora=True)}
LORA = KINDS["lora"]
EXAMPLES = [Example(group.prompt, group.responses[0]) for group in toy_groups(24)]
HELDOUT = [Example(group.prompt, group.responses[0]) for group in toy_groups(6, seed=2)]


def policy(lora: LoraConfig = LORA) -> Any:
    model = tiny_policy()
    add_adapters(model, lora, seed=5)
    return model


def reward_model(lora: LoraConfig) -> nn.Module:
    model = RewardModel.from_policy(tiny_policy(), "last", seed=2)
    add_adapters(model.body, lora, seed=6)
    return model


def value_model(lora: LoraConfig) -> nn.Module:
    model = ValueModel.from_reward_model(RewardModel.from_policy(tiny_policy(), "last", seed=2))
    add_adapters(model.body, lora, seed=7)
    return model


def state_of(**modules: nn.Module) -> TrainState:
    return TrainState(
        modules=modules, optimizers={name: make_optimizer(module, 3e-3) for name, module in modules.items()}
    )


def sft(state: TrainState, log: Any, save: Any, world: Any = ALONE) -> TrainState:
    cfg = SFTConfig(max_steps=8, batch_size=6, eval_every=3, save_every=2, learning_rate=3e-3, warmup_steps=1)
    return train_sft(
        cfg, state, EXAMPLES, HELDOUT, RunContext(seed=0, pad_id=PAD, log=log, checkpoint=save, world=world)
    )


def reward(state: TrainState, log: Any, save: Any) -> TrainState:
    cfg = RewardConfig(epochs=2, prompts_per_step=6, warmup_steps=1, save_every=2, learning_rate=3e-3)
    return train_reward(cfg, state, toy_groups(24), RunContext(seed=0, pad_id=PAD, log=log, checkpoint=save)).state


def dpo(state: TrainState, log: Any, save: Any) -> TrainState:
    cfg = DPOConfig(prompts_per_step=8, epochs=2, warmup_steps=1, save_every=2, learning_rate=3e-3)
    reference = state.modules["policy"]  # without its adapters
    return train_dpo(cfg, state, reference, toy_groups(24), RunContext(seed=0, pad_id=PAD, log=log, checkpoint=save))


def ppo(state: TrainState, log: Any, save: Any) -> TrainState:
    cfg = changed(CFG, steps=6, save_every=2, learning_rate=3e-3, warmup_steps=0)
    return run(cfg, state, reference=state.modules["policy"], log=log, checkpoint=save)


@dataclass(frozen=True)
class Case:
    make: Callable[[], TrainState]
    train: Callable[..., TrainState]
    heads: tuple[str, ...] = ()


def cases(lora: LoraConfig) -> dict[str, Case]:
    return {
        "sft": Case(lambda: state_of(policy=policy(lora)), sft),
        "reward": Case(lambda: state_of(reward=reward_model(lora)), reward, ("head",)),
        "dpo": Case(lambda: state_of(policy=policy(lora)), dpo),
        "ppo": Case(lambda: state_of(policy=policy(lora), value=value_model(lora)), ppo, ("scalar",)),
    }


CASES = {f"{trainer}, {kind}": case for kind, lora in KINDS.items() for trainer, case in cases(lora).items()}


def frozen(state: TrainState) -> dict[str, Tensor]:
    return {
        f"{module}.{name}": parameter.detach().clone()
        for module, network in state.modules.items()
        for name, parameter in network.named_parameters()
        if not parameter.requires_grad
    }


@pytest.mark.parametrize("name", CASES)
def test_adapters_and_heads_learn_and_all_else_keeps_its_bits(name: str, sink: Any) -> None:
    case = CASES[name]
    state = case.make()
    before = frozen(state)
    assert before
    case.train(state, sink, lambda _: None)
    if "ppo" not in name:  # whose loss is no measure of what it has learned
        assert state.history[-1]["loss/train"] < state.history[0]["loss/train"] - 0.02
    after = frozen(state)
    assert before.keys() == after.keys(), "what was frozen is frozen still"
    assert all(torch.equal(before[key], after[key]) for key in before)
    for network in state.modules.values():
        for _, layer in adapted_layers(network):
            assert layer.lora_B["default"].weight.abs().max() > 0
            for magnitude in layer.lora_magnitude_vector.values():
                assert not torch.allclose(magnitude.weight, layer.base_layer.weight.norm(dim=1), atol=1e-4, rtol=0)
        trained = {key.split(".")[0] for key, p in network.named_parameters() if p.requires_grad and "lora_" not in key}
        assert trained <= set(case.heads)


@pytest.mark.parametrize("name", CASES)
def test_broken_off_and_resumed_it_ends_with_the_same_bits(
    name: str, harness: Callable[..., Any], same_state: Callable[..., None]
) -> None:
    runs = harness(CASES[name].make, CASES[name].train)
    same_state(runs.unbroken(), runs.resumed_after(5))


@pytest.mark.parametrize("kind", KINDS)
def test_n32_dpo_begins_at_exactly_ln_2_against_the_policy_without_its_adapters(kind: str, sink: Any) -> None:
    dpo(CASES[f"dpo, {kind}"].make(), sink, lambda _: None)
    first = sink.rows[0][2]
    assert first["loss/preference"] == torch.tensor(2.0).log().item()
    assert (first["implicit_reward/chosen"], first["implicit_reward/rejected"]) == (0.0, 0.0)
    assert sink.rows[-1][2]["implicit_reward/chosen"] != 0.0, "and then it leaves its reference"


@pytest.mark.parametrize("lora", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("weigh", [None, HardExamplesConfig()], ids=["plain", "hard examples"])
def test_n25_two_processes_take_the_steps_of_one(weigh: HardExamplesConfig | None, lora: LoraConfig) -> None:
    cfg = SFTConfig(
        max_steps=6, batch_size=5, eval_every=3, learning_rate=3e-3, warmup_steps=1, hard_examples=weigh, patience=9
    )

    def work(world: Any) -> TrainState:
        return train_sft(
            cfg, state_of(policy=policy(lora).double()), EXAMPLES, HELDOUT, RunContext(seed=0, pad_id=PAD, world=world)
        )

    alone, (first, second) = work(ALONE), in_processes(2, work)
    for one, two, other in zip(
        *(list(state.modules["policy"].parameters()) for state in (alone, first, second)), strict=True
    ):
        assert torch.equal(two, other)
        torch.testing.assert_close(two, one, atol=1e-9, rtol=0)
    assert first.history == second.history
    assert first.extra == second.extra
    for one, two in zip(alone.history, first.history, strict=True):
        assert two == pytest.approx(one, rel=1e-8)
