"""Toy policies, rewards and runs for the tests of PPO."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_core.config import ModelConfig, PPOConfig
from rlhf_core.engine.batches import SequenceBatch
from rlhf_core.models.policy import build_policy
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.models.scoring.value import ValueHead, ValueModel
from rlhf_core.rollout.sampler import Sampling
from rlhf_core.state.run_context import RunContext
from rlhf_core.state.train_state import TrainState
from rlhf_core.state.world import ALONE, World
from rlhf_core.trainers.optimisation import make_optimizer
from rlhf_core.trainers.ppo.guard import Watch
from rlhf_core.trainers.ppo.parts import Rollout
from rlhf_core.trainers.ppo.rollout import RolloutSetup, collect_rollout, write_responses
from rlhf_core.trainers.ppo.terms import RewardTerm
from rlhf_core.trainers.ppo.trainer import Rewards, train_ppo

PAD, EOS, GOOD, VOCABULARY = 0, 1, 5, 24
TINY = ModelConfig(
    hidden_size=32,
    layers=1,
    heads=2,
    intermediate_size=64,
    init_std=0.1,
    vocab_size=512,
    max_prompt_tokens=8,
    max_response_tokens=8,
)
SAMPLING = Sampling(eos_ids=(EOS,), pad_id=PAD, max_new_tokens=8)
PROMPTS = [[7 + i % 17, 7 + i % 5][: 1 + i % 2] for i in range(23)]
CFG = PPOConfig(steps=6, rollout_batch=16, minibatch=8, epochs=2, warmup_steps=2, save_every=2, target_kl=10.0)
RATES = {"policy": 1e-3, "value": 1e-3}
_BUILT = build_policy(TINY, VOCABULARY, PAD, EOS, seed=1)


def changed(cfg: PPOConfig, **updates: Any) -> PPOConfig:
    """The settings with others in place of some; sections are given as dictionaries of what differs in them."""
    return PPOConfig.model_validate(_merged(cfg.model_dump(), updates))


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    nested = {key: _merged(old[key], value) for key, value in new.items() if isinstance(value, dict) and key != "terms"}
    return old | new | nested


def tiny_policy() -> PreTrainedModel:
    """Equal small policies."""
    return copy.deepcopy(_BUILT)


def make_state(cfg: PPOConfig = CFG) -> TrainState:
    """A fresh state with the value model that `cfg` asks for."""
    policy = tiny_policy()
    modules: dict[str, nn.Module] = {"policy": policy}
    if cfg.has_value_model and cfg.value.model == "shared":
        modules["value"] = ValueHead(policy.config.hidden_size)
    elif cfg.has_value_model:
        modules["value"] = ValueModel.from_reward_model(RewardModel.from_policy(tiny_policy(), "last", seed=2))
    optimizers = {name: make_optimizer(module, RATES[name], betas=(0.9, 0.95)) for name, module in modules.items()}
    return TrainState(modules=modules, optimizers=optimizers)


def share_of(token: int) -> Callable[[SequenceBatch], Tensor]:
    """A rule in the place of a reward model: how much of the response is `token`."""

    def score(batch: SequenceBatch) -> Tensor:
        hits_BR = (batch.response_ids_BR == token).float() * batch.response_mask_BR
        return hits_BR.sum(1) / batch.response_mask_BR.sum(1)

    return score


share_of_good = share_of(GOOD)


def quiet(*_: object) -> None:
    """Listens to nothing."""


def run(
    cfg: PPOConfig,
    state: TrainState | None = None,
    reward_fn: Callable[[SequenceBatch], Tensor] = share_of_good,
    *,
    prompts: Sequence[list[int]] = PROMPTS,
    reference: nn.Module | None = None,
    log: Any = quiet,
    checkpoint: Any = quiet,
    world: World = ALONE,
    terms: Sequence[RewardTerm] = (),
    watch: Watch | None = None,
) -> TrainState:
    """Train on the toy task."""
    return train_ppo(
        cfg,
        make_state(cfg) if state is None else state,
        tiny_policy() if reference is None else reference,
        Rewards(reward_fn, terms),
        prompts,
        RunContext(seed=0, pad_id=PAD, log=log, checkpoint=checkpoint, world=world),
        sampling=SAMPLING,
        watch=watch,
    )


def setup_of(
    cfg: PPOConfig,
    state: TrainState,
    score: Callable[[SequenceBatch], Tensor] = share_of_good,
    *,
    reference: nn.Module | None = None,
    world: World = ALONE,
) -> RolloutSetup:
    """What rollouts of the toy task are made with."""
    return RolloutSetup(
        cfg=cfg,
        modules=state.modules,
        reference=tiny_policy() if reference is None else reference,
        score=score,
        prompts=PROMPTS,
        sampling=SAMPLING,
        run=RunContext(seed=0, pad_id=PAD, world=world),
    )


def roll(cfg: PPOConfig, state: TrainState, seed: int = 3, world: World = ALONE) -> Rollout:
    """A rollout to the first prompts."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [row // cfg.responses_per_prompt for row in range(cfg.rollout_batch)]
    setup = setup_of(cfg, state, world=world)
    return collect_rollout(setup, write_responses(setup, chosen, generator), [], generator)


def weights(state: TrainState) -> list[Tensor]:
    """All trainable weights."""
    return [p.detach().clone() for module in state.modules.values() for p in module.parameters() if p.requires_grad]
