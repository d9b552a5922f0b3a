"""Our side of the benchmarks of sampling and PPO."""

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.clock import Clock
from benchmarks.flops import decode_bytes
from benchmarks.ours import compute_as
from benchmarks.rates import bandwidth
from benchmarks.rollouts import EPOCHS, MINIBATCHES, NEW_TOKENS, RATE, load, make_prompts
from benchmarks.worker import Setting
from rlhf_core.config import PPOConfig
from rlhf_core.config.lora import LoraConfig
from rlhf_core.models.adapters import add_adapters
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.models.scoring.value import ValueHead, ValueModel
from rlhf_core.rollout.sampler import Sampling, sample_responses
from rlhf_core.state.run_context import RunContext
from rlhf_core.state.train_state import TrainState
from rlhf_core.trainers.optimisation import make_optimizer
from rlhf_core.trainers.ppo.trainer import Rewards, train_ppo

NEVER = 10**9


def sampling(setting: Setting, clock: Clock) -> dict[str, Any]:
    """Responses of 64 tokens, all at once, with their log-probabilities."""
    compute_as(setting)
    return sampled(setting, clock, load(setting.subject, ends=False).to(setting.device), [])


def sampled(setting: Setting, clock: Clock, model: Any, written: list[list[list[int]]]) -> dict[str, Any]:
    """The same with a model that is there; the tokens of each step are added to `written`."""
    subject, many = setting.subject, setting.responses
    batches = [make_prompts(many, subject, setting.seed * 1000 + step) for step in range(setting.num_steps)]
    clock.begin()
    for step, prompts in enumerate(batches):
        samples = sample_responses(
            model,
            prompts,
            Sampling(eos_ids=(), pad_id=subject.pad, max_new_tokens=NEW_TOKENS),
            temperature=1.0,
            generator=torch.Generator().manual_seed(step),
            batch_size=many,
        )
        clock.tick(sum(map(len, samples.response_ids)))
        written.append(samples.response_ids)
    counted, width = batches[setting.warmup :], 4 if setting.device == "cpu" else 2
    read = [decode_bytes(subject.size, list(map(len, prompts)), NEW_TOKENS, many, width) for prompts in counted]
    tokens = many * NEW_TOKENS * len(counted)
    return {"bytes_per_token": sum(read) / tokens, "bytes_per_s": bandwidth(setting.device)}


def ppo_fixed(setting: Setting, clock: Clock) -> dict[str, Any]:
    """Whole rollouts with a value model of its own; no response ends."""
    return ppo(setting, clock, ends=False, value="separate")


def ppo_ending(setting: Setting, clock: Clock) -> dict[str, Any]:
    """The same where responses end by themselves."""
    return ppo(setting, clock, ends=True, value="separate")


def ppo_shared(setting: Setting, clock: Clock) -> dict[str, Any]:
    """Responses end by themselves, and the value is a head on the policy's states."""
    return ppo(setting, clock, ends=True, value="shared")


class _Ticks:
    """A `MetricSink` that tells the clock of each rollout's tokens."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._before, self.lengths = clock, 0, 0.0

    def __call__(self, step: int, total: int, metrics: Mapping[str, float], tokens: int) -> None:
        self._clock.tick(tokens - self._before)
        self._before = tokens
        self.lengths = metrics["rollout/response_tokens"]
        assert metrics["policy/updates"] == EPOCHS * MINIBATCHES


def ppo(setting: Setting, clock: Clock, *, ends: bool, value: str, rank: int = 0) -> dict[str, Any]:
    """Rollouts with their updates; with adapters of a rank, the reference is the policy without them."""
    compute_as(setting)
    subject, many = setting.subject, setting.responses
    policy = load(subject, ends=ends).to(setting.device)
    scorer = RewardModel.from_policy(policy, "last", seed=1)
    add_adapters(policy, LoraConfig(rank=rank, alpha=2 * rank) if rank else None, seed=0)
    reference = policy if rank else load(subject, ends=ends).to(setting.device)
    head = ValueModel.from_reward_model(scorer) if value == "separate" else ValueHead(policy.config.hidden_size)
    head.to(setting.device)
    modules = {"policy": policy, "value": head}
    state = TrainState(
        modules=modules, optimizers={name: make_optimizer(module, RATE) for name, module in modules.items()}
    )
    steps = setting.num_steps
    cfg = PPOConfig.model_validate(
        {
            "steps": steps,
            "rollout_batch": many,
            "minibatch": many // MINIBATCHES,
            "epochs": EPOCHS,
            "learning_rate": RATE,
            "value_learning_rate": RATE,
            "target_kl": 1e9,
            "save_every": NEVER,
            "value": {"model": value},
        }
    )
    ticks = _Ticks(clock)
    clock.begin()
    train_ppo(
        cfg,
        state,
        reference,
        Rewards(scorer),
        make_prompts(steps * many, subject, setting.seed),
        RunContext(seed=setting.seed, pad_id=subject.pad, log=ticks),
        sampling=Sampling(eos_ids=(subject.end,) if ends else (), pad_id=subject.pad, max_new_tokens=NEW_TOKENS),
    )
    return {"response_tokens": ticks.lengths}
