"""Our side of the benchmarks: the project's own trainers, as the stages call them."""

from collections.abc import Mapping
from typing import Any

from benchmarks.clock import Clock
from benchmarks.flops import Reads, data_tokens, model_flop, training_flop
from benchmarks.rates import matmul_rate
from benchmarks.worker import Setting
from benchmarks.workload import make_pairs
from rlhf_core.config import DPOConfig, RewardConfig, SFTConfig
from rlhf_core.config.lora import LoraConfig
from rlhf_core.data.batching.examples import Example
from rlhf_core.data.batching.pairs import PreferencePair, group_pairs
from rlhf_core.models.adapters import add_adapters
from rlhf_core.models.policy import load_policy
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.state.compute_mode import ComputeMode, set_compute_mode
from rlhf_core.state.run_context import RunContext
from rlhf_core.state.train_state import TrainState
from rlhf_core.trainers.optimisation import make_optimizer
from rlhf_core.trainers.preference.trainer import train_dpo
from rlhf_core.trainers.reward.trainer import train_reward
from rlhf_core.trainers.sft import train_sft

RATE = 1e-4
RANK = 16  # of adapters
NEVER = 10**9  # steps between checkpoints


class Ticks:
    """A `MetricSink` that tells the clock of each step's tokens, and notes the losses."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._before = clock, 0
        self.losses: list[float] = []

    def __call__(self, step: int, total: int, metrics: Mapping[str, float], tokens: int) -> None:
        self._clock.tick(tokens - self._before)
        self._before = tokens
        self.losses.append(metrics["loss/train"])


def _no_checkpoint(state: TrainState) -> None:
    """Checkpoints are not what is measured here."""


def compute_as(setting: Setting) -> None:
    """Matrix products in the number format of the device."""
    set_compute_mode(ComputeMode(precision="float32" if setting.device == "cpu" else "bfloat16"))


def _policy(setting: Setting) -> Any:
    compute_as(setting)
    return load_policy(setting.subject.folder).to(setting.device)


def sft(setting: Setting, clock: Clock) -> dict[str, Any]:
    """Supervised fine-tuning on responses only."""
    return _sft(setting, clock, _policy(setting))


def sft_lora(setting: Setting, clock: Clock) -> dict[str, Any]:
    """The same with low-rank adapters on all linear layers."""
    policy = _policy(setting)
    add_adapters(policy, LoraConfig(rank=RANK, alpha=2 * RANK), seed=0)
    return _sft(setting, clock, policy, frozen=True)


def _sft(setting: Setting, clock: Clock, policy: Any, *, frozen: bool = False) -> dict[str, Any]:
    state = TrainState(modules={"policy": policy}, optimizers={"policy": make_optimizer(policy, RATE)})
    rows = make_pairs(setting.num_rows, setting.subject, setting.seed)
    cfg = SFTConfig(
        max_steps=setting.steps + setting.warmup, batch_size=setting.rows, learning_rate=RATE, save_every=NEVER
    )
    ticks = Ticks(clock)
    clock.begin()
    train_sft(
        cfg,
        state,
        [Example(row.prompt, row.chosen) for row in rows],
        [],
        RunContext(seed=setting.seed, pad_id=setting.subject.pad, log=ticks),
    )
    return _extra(setting, ticks, "chosen", frozen=frozen)


def reward(setting: Setting, clock: Clock) -> dict[str, Any]:
    """Bradley-Terry with a scalar at the last token."""
    model = RewardModel.from_policy(_policy(setting), "last", seed=0)
    state = TrainState(modules={"reward": model}, optimizers={"reward": make_optimizer(model, RATE)})
    cfg = RewardConfig(epochs=1, prompts_per_step=setting.rows, learning_rate=RATE, centering=0.0, save_every=NEVER)
    ticks = Ticks(clock)
    groups = group_pairs(_pairs(setting))
    clock.begin()
    train_reward(cfg, state, groups, RunContext(seed=setting.seed, pad_id=setting.subject.pad, log=ticks))
    return _extra(setting, ticks, "ends")


def dpo(setting: Setting, clock: Clock) -> dict[str, Any]:
    """DPO with the reference's log-probabilities computed beforehand, which the clock does not count."""
    policy = _policy(setting)
    state = TrainState(modules={"policy": policy}, optimizers={"policy": make_optimizer(policy, RATE)})
    cfg = DPOConfig(epochs=1, prompts_per_step=setting.rows, learning_rate=RATE, save_every=NEVER)
    ticks = Ticks(clock)
    clock.begin()
    train_dpo(
        cfg,
        state,
        _policy(setting),
        group_pairs(_pairs(setting)),
        RunContext(seed=setting.seed, pad_id=setting.subject.pad, log=ticks),
    )
    return _extra(setting, ticks, "both")


def _extra(setting: Setting, ticks: Ticks, reads: Reads, *, frozen: bool = False) -> dict[str, Any]:
    """First and last loss; operations a token by formula; operations a second of matrix products, measured now."""
    size = setting.subject.size
    rows = make_pairs(setting.num_rows, setting.subject, setting.seed)
    return {
        "loss_first": ticks.losses[0],
        "loss_last": ticks.losses[-1],
        "flop_per_token": training_flop(size, rows, reads, frozen=frozen) / data_tokens(rows, reads),
        "model_flop_per_token": model_flop(size, rows, reads, frozen=frozen) / data_tokens(rows, reads),
        "matmul_flop_per_s": matmul_rate(size, with_output=reads != "ends", device=setting.device),
    }


def _pairs(setting: Setting) -> list[PreferencePair]:
    rows = make_pairs(setting.num_rows, setting.subject, setting.seed)
    return [PreferencePair(prompt=row.prompt, chosen=row.chosen, rejected=row.rejected) for row in rows]
