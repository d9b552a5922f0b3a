"""Twenty steps of each trainer on a toy task, as text: what `tests/rlhf_core/golden/` holds and `make golden` rewrites.

The models are tiny, in float32 on one thread, and everything is seeded, so a change of a curve is a change of the
arithmetic. Record again only for a change that is meant, and say in the commit what moved it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_core.config import DPOConfig, ModelConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf_core.data.batching.examples import Example
from rlhf_core.engine.batches import SequenceBatch
from rlhf_core.models.policy import build_policy
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.models.scoring.value import ValueModel
from rlhf_core.rollout.sampler import Sampling
from rlhf_core.state.run_context import RunContext
from rlhf_core.state.train_state import TrainState
from rlhf_core.trainers.optimisation import make_optimizer
from rlhf_core.trainers.ppo.trainer import Rewards, train_ppo
from rlhf_core.trainers.preference.trainer import train_dpo
from rlhf_core.trainers.reward.trainer import train_reward
from rlhf_core.trainers.sft import train_sft
from support.preference import EOS, PAD, toy_groups

FOLDER = Path(__file__).parents[1] / "rlhf_core/golden"
STEPS, VOCABULARY = 20, 24
MODEL = ModelConfig(hidden_size=32, layers=2, heads=2, intermediate_size=64, init_std=0.1, vocab_size=512)
GENTLE: dict[str, Any] = {"warmup_steps": 4, "min_learning_rate_share": 0.5}


def policy() -> PreTrainedModel:
    """The model that every curve starts from."""
    return build_policy(MODEL, VOCABULARY, PAD, EOS, seed=1)


def state_of(rate: float, **modules: torch.nn.Module) -> TrainState:
    """A state before its first step, an optimiser for each module."""
    return TrainState(
        modules=modules, optimizers={name: make_optimizer(module, rate) for name, module in modules.items()}
    )


def quiet(*_: object) -> None:
    """Reports and checkpoints that nobody keeps."""


def sft() -> list[dict[str, float]]:
    """Supervised fine-tuning on the chosen responses, in two micro-batches."""
    examples = [Example(group.prompt, group.responses[0]) for group in toy_groups(48)]
    cfg = SFTConfig(max_steps=STEPS, batch_size=8, accumulation=2, learning_rate=2e-3, **GENTLE)
    state = state_of(2e-3, policy=policy())
    return train_sft(cfg, state, examples, [], RunContext(seed=0, pad_id=PAD)).history


def reward() -> list[dict[str, float]]:
    """Bradley-Terry on the last token."""
    cfg = RewardConfig(epochs=2, prompts_per_step=4, learning_rate=1e-3, **GENTLE)
    state = state_of(1e-3, reward=RewardModel.from_policy(policy(), "last", seed=2))
    return train_reward(cfg, state, toy_groups(40), RunContext(seed=0, pad_id=PAD)).state.history


def dpo() -> list[dict[str, float]]:
    """Sigmoid DPO with the likelihood term."""
    cfg = DPOConfig(epochs=2, prompts_per_step=4, learning_rate=1e-3, nll_coef=0.2, **GENTLE)
    state = state_of(1e-3, policy=policy())
    return train_dpo(cfg, state, policy(), toy_groups(40), RunContext(seed=0, pad_id=PAD)).history


def ppo() -> list[dict[str, float]]:
    """PPO with a separate value model, rewarded for one token."""
    cfg = PPOConfig(steps=STEPS, rollout_batch=16, minibatch=8, learning_rate=1e-3, kl_coef=0.05, **GENTLE)
    value = ValueModel.from_reward_model(RewardModel.from_policy(policy(), "last", seed=2))
    state = state_of(1e-3, policy=policy(), value=value)
    prompts = [group.prompt for group in toy_groups(24)]
    return train_ppo(
        cfg,
        state,
        policy(),
        Rewards(share_of_one_token),
        prompts,
        RunContext(seed=0, pad_id=PAD),
        sampling=Sampling(eos_ids=(EOS,), pad_id=PAD, max_new_tokens=8),
    ).history


def share_of_one_token(batch: SequenceBatch) -> Tensor:
    """A rule in the place of a reward model."""
    hits_BR = (batch.response_ids_BR == 5).float() * batch.response_mask_BR
    return hits_BR.sum(1) / batch.response_mask_BR.sum(1)


CURVES: dict[str, tuple[Callable[[], list[dict[str, float]]], tuple[str, ...]]] = {
    "sft": (sft, ("loss/train", "optim/grad_norm")),
    "reward": (reward, ("loss/train", "reward/margin", "reward/accuracy", "optim/grad_norm")),
    "dpo": (dpo, ("loss/train", "loss/chosen_nll", "implicit_reward/margin", "optim/grad_norm")),
    "ppo": (ppo, ("loss/policy", "loss/value", "reward/score", "rollout/kl_to_reference", "policy/entropy")),
}
"""Each trainer's run, and the figures of a step that are kept."""


def run(name: str) -> list[list[float]]:
    """The kept figures of each step of a curve, on one thread."""
    train, keys = CURVES[name]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [[row[key] for key in keys] for row in train()]
    finally:
        torch.set_num_threads(before)


def read(name: str) -> list[list[float]]:
    """The recorded figures of each step of a curve."""
    lines = [line for line in (FOLDER / f"{name}.txt").read_text().splitlines() if not line.startswith("#")]
    return [[float(cell) for cell in line.split()[1:]] for line in lines]


def write(name: str, rows: Sequence[Sequence[float]]) -> None:
    """Record a curve: a line a step, nine digits."""
    lines = [f"# step {' '.join(CURVES[name][1])}"]
    lines += [" ".join([f"{step:2d}", *(f"{cell:16.9e}" for cell in row)]) for step, row in enumerate(rows, start=1)]
    (FOLDER / f"{name}.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    for curve in CURVES:
        write(curve, run(curve))
