"""Architectures of today through every trainer: SFT against plain transformers, all broken off and resumed."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from support.architectures import ARCHITECTURES, EOS, PAD, write_folder
from support.ppo import CFG, changed, run, share_of_good
from support.preference import toy_groups
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_core.config import DPOConfig, RewardConfig, SFTConfig
from rlhf_core.config.lora import LoraConfig
from rlhf_core.data.batching.examples import Example
from rlhf_core.models.adapters import add_adapters
from rlhf_core.models.policy import load_policy
from rlhf_core.models.scoring.heads import Head
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.models.scoring.value import ValueModel
from rlhf_core.state.run_context import RunContext
from rlhf_core.state.train_state import TrainState
from rlhf_core.trainers.optimisation import fresh_state
from rlhf_core.trainers.preference.trainer import train_dpo
from rlhf_core.trainers.reward.trainer import train_reward
from rlhf_core.trainers.sft import train_sft

RATE = 1e-3
LORA = LoraConfig(rank=4, alpha=8)
GROUPS = toy_groups(16)
EXAMPLES = [Example(group.prompt, group.responses[0]) for group in GROUPS]
HEADS = get_args(Head)
ALIKE = {"mistral, sliding", "phi 3", "phi 3, longrope"}
"""Nothing in them that a trainer could see and the others do not have."""


@pytest.fixture(params=[name for name in ARCHITECTURES if name not in ALIKE], scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(request.param, tmp_path_factory.mktemp("pretrained"))


@dataclass(frozen=True)
class Start:
    """A folder's model as a run begins with it, all weights or adapters."""

    folder: Path
    lora: LoraConfig | None

    def policy(self) -> PreTrainedModel:
        model = load_policy(self.folder)
        add_adapters(model, self.lora, seed=5)
        return model

    def reference(self, policy: Any) -> Any:
        return policy if self.lora else load_policy(self.folder)

    def reward_model(self, head: str) -> RewardModel:
        model = RewardModel.from_policy(load_policy(self.folder), head, seed=2)
        add_adapters(model.body, self.lora, seed=6)
        return model

    def value_model(self) -> ValueModel:
        model = ValueModel.from_reward_model(RewardModel.from_policy(load_policy(self.folder), "last", seed=2))
        add_adapters(model.body, self.lora, seed=7)
        return model


def run_of(log: Any, save: Any) -> RunContext:
    return RunContext(seed=0, pad_id=PAD, log=log, checkpoint=save)


def sft(state: TrainState, log: Any, save: Any) -> TrainState:
    cfg = SFTConfig(max_steps=4, batch_size=6, eval_every=9, save_every=1, learning_rate=RATE, warmup_steps=0)
    return train_sft(cfg, state, EXAMPLES, [], run_of(log, save))


def reward(state: TrainState, log: Any, save: Any) -> TrainState:
    cfg = RewardConfig(epochs=1, prompts_per_step=4, warmup_steps=0, save_every=1, learning_rate=RATE)
    return train_reward(cfg, state, GROUPS, run_of(log, save)).state


def dpo(start: Start) -> Callable[..., TrainState]:
    cfg = DPOConfig(prompts_per_step=4, epochs=1, warmup_steps=0, save_every=1, learning_rate=RATE)
    return lambda state, log, save: train_dpo(
        cfg, state, start.reference(state.modules["policy"]), GROUPS, run_of(log, save)
    )


def ppo(start: Start) -> Callable[..., TrainState]:
    """Against a rule and the architecture's own untrained reward model."""
    cfg = changed(
        CFG, steps=3, rollout_batch=6, minibatch=6, epochs=1, save_every=1, learning_rate=RATE, warmup_steps=0
    )
    judge = start.reward_model("last")
    return lambda state, log, save: run(
        cfg,
        state,
        lambda batch: share_of_good(batch) + 0.1 * judge(batch).detach(),
        reference=start.reference(state.modules["policy"]),
        log=log,
        checkpoint=save,
    )


@pytest.mark.parametrize("lora", [None, LORA], ids=["all weights", "lora"])
@pytest.mark.parametrize("trainer", ["sft", "reward", "dpo", "ppo"])
def test_every_trainer_learns_and_resumes_with_the_same_bits(
    folder: Path, trainer: str, lora: LoraConfig | None, harness: Callable[..., Any], same_state: Callable[..., None]
) -> None:
    start = Start(folder, lora)
    make = {
        "sft": lambda: fresh_state({"policy": start.policy()}, RATE),
        "reward": lambda: fresh_state({"reward": start.reward_model("attention")}, RATE),
        "dpo": lambda: fresh_state({"policy": start.policy()}, RATE),
        "ppo": lambda: fresh_state({"policy": start.policy(), "value": start.value_model()}, RATE),
    }[trainer]
    train = {"sft": sft, "reward": reward, "dpo": dpo(start), "ppo": ppo(start)}[trainer]
    runs = harness(make, train)
    unbroken = runs.unbroken()
    same_state(unbroken, runs.resumed_after(2))
    first = unbroken.history[0]
    assert all(math.isfinite(value) for row in unbroken.history for value in row.values())
    if trainer == "dpo":
        assert first["loss/preference"] == torch.tensor(2.0).log().item()
    if trainer == "ppo":
        assert first["policy/ratio_max"] == 1.0, "one update a rollout: the policy that wrote it"
    before = make()
    for name, module in unbroken.modules.items():
        moved = [
            not torch.equal(one, two)
            for one, two in zip(module.parameters(), before.modules[name].parameters(), strict=True)
            if one.requires_grad
        ]
        assert sum(moved) >= 0.9 * len(moved), name


@pytest.mark.parametrize("head", HEADS)
def test_reward_models_learn_with_every_head(folder: Path, head: str) -> None:
    state = fresh_state({"reward": Start(folder, None).reward_model(head)}, RATE)
    cfg = RewardConfig(epochs=5, prompts_per_step=8, warmup_steps=0, learning_rate=RATE)
    train_reward(cfg, state, GROUPS, run_of(lambda *_: None, lambda _: None))
    assert state.history[-1]["loss/train"] < 0.8 * state.history[0]["loss/train"]


def test_sft_takes_the_steps_of_plain_transformers(folder: Path) -> None:
    """Cross-entropy over labels, AdamW and clipping by torch, row by row, in eager attention: the same losses."""
    state = fresh_state({"policy": load_policy(folder)}, RATE)
    cfg = SFTConfig(
        max_steps=3,
        batch_size=len(EXAMPLES),
        eval_every=9,
        learning_rate=RATE,
        warmup_steps=0,
        min_learning_rate_share=1.0,
        max_grad_norm=1.0,
    )
    train_sft(cfg, state, EXAMPLES, [], run_of(lambda *_: None, lambda _: None))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)
    targets = sum(len(example.response) for example in EXAMPLES)
    for step in range(3):
        optimizer.zero_grad()
        total = 0.0
        for example in EXAMPLES:
            ids = torch.tensor([example.prompt + example.response])
            labels = ids.clone()
            labels[:, : len(example.prompt)] = -100
            loss = theirs(input_ids=ids, labels=labels, use_cache=False).loss * len(example.response) / targets
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        assert state.history[step]["loss/train"] == pytest.approx(total, rel=2e-5), step
    assert state.history[2]["loss/train"] < state.history[0]["loss/train"]
    assert EOS in EXAMPLES[0].response
