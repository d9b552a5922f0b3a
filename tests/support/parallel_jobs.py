"""Short trainings that one process and two processes do alike; under torchrun this file is their program.

`python -m torch.distributed.run ... parallel_jobs.py <folder> <job>...` leaves `<folder>/<job>/weights.safetensors` and
`history.json`, written by the first process.
"""

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM

from rlhf_core.config import DPOConfig, ModelConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf_core.config.lora import LoraConfig
from rlhf_core.data.batching.examples import Example
from rlhf_core.data.batching.pairs import PreferenceGroup, PreferencePair, group_pairs
from rlhf_core.engine.batches import SequenceBatch
from rlhf_core.models.adapters import add_adapters
from rlhf_core.models.policy import build_policy
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.models.scoring.value import ValueModel
from rlhf_core.rollout.sampler import Sampling
from rlhf_core.state.checkpoint import Checkpointer
from rlhf_core.state.compute_mode import ComputeMode, computing
from rlhf_core.state.run_context import RunContext
from rlhf_core.state.sharding import restore_whole, shard
from rlhf_core.state.train_state import TrainState
from rlhf_core.state.world import ALONE, World
from rlhf_core.trainers.optimisation import make_optimizer
from rlhf_core.trainers.ppo.guard import Watch
from rlhf_core.trainers.ppo.terms import diversity_term
from rlhf_core.trainers.ppo.trainer import Rewards, train_ppo
from rlhf_core.trainers.preference.trainer import train_dpo
from rlhf_core.trainers.reward.trainer import train_reward
from rlhf_core.trainers.sft import train_sft

PAD, EOS, GOOD = 0, 1, 5
PROMPTS = [[7 + i % 17, 7 + i % 5][: 1 + i % 2] for i in range(23)]
TINY = ModelConfig(
    hidden_size=32,
    layers=2,
    heads=2,
    intermediate_size=64,
    init_std=0.1,
    vocab_size=512,
    max_prompt_tokens=8,
    max_response_tokens=8,
)
# Adam moves a weight by the rate whatever the size of its gradient, so where the gradient is little more than the
# rounding of its sum the rate bounds how far two orders of sums can part. At this one the bound is near 1e-6.
RATE = 1e-4


DEVICE_VARIABLE = "PARALLEL_JOBS_DEVICE"
"""Environment variable: `cuda` for a GPU a process and NCCL; else CPUs and gloo."""


def policy() -> Any:
    return build_policy(TINY, 24, PAD, EOS, seed=1).to(os.environ.get(DEVICE_VARIABLE, "cpu"))


def draw(generator: torch.Generator, most: int) -> list[int]:
    length = int(torch.randint(1, most, (1,), generator=generator))
    return torch.randint(7, 24, (length,), generator=generator).tolist()


def examples(count: int, seed: int) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    return [Example(draw(generator, 8), [*draw(generator, 8), EOS]) for _ in range(count)]


def groups(count: int) -> list[PreferenceGroup]:
    generator = torch.Generator().manual_seed(4)
    pairs = []
    for _ in range(count):
        prompt, sides = draw(generator, 8), [[*draw(generator, 6), end, EOS] for end in (GOOD, 6, 6)]
        pairs += [PreferencePair(prompt=prompt, chosen=sides[0], rejected=side) for side in sides[1:]]
    return group_pairs(pairs)


def share_of_good(batch: SequenceBatch) -> Tensor:
    hits_BR = (batch.response_ids_BR == GOOD).float() * batch.response_mask_BR
    return hits_BR.sum(1) / batch.response_mask_BR.sum(1)


def run_of(world: World, more: dict[str, Any]) -> RunContext:
    """The edges of a job: `more` has who hears of it and keeps it."""
    return RunContext(seed=0, pad_id=PAD, world=world, **more)


Train = Callable[[TrainState, World, dict[str, Any]], TrainState]


def sft(state: TrainState, world: World, more: dict[str, Any]) -> TrainState:
    # 15 rows in batches of 4, two micro-batches each: shares of unequal size, and a last batch of three rows.
    cfg = SFTConfig(
        max_steps=6, batch_size=4, accumulation=2, learning_rate=RATE, warmup_steps=2, eval_every=2, save_every=2
    )
    return train_sft(cfg, state, examples(15, 2), examples(5, 3), run_of(world, more))


def sft_lonely(state: TrainState, world: World, more: dict[str, Any]) -> TrainState:
    """One row a step: the second process has nothing to do but to keep step."""
    cfg = SFTConfig(max_steps=3, batch_size=1, learning_rate=RATE, warmup_steps=1, eval_every=5, save_every=2)
    return train_sft(cfg, state, examples(3, 2), [], run_of(world, more))


def sft_lora(state: TrainState, world: World, more: dict[str, Any]) -> TrainState:
    """Adapters beside frozen weights, layers computed again in the backward pass."""
    with computing(ComputeMode(activation_checkpointing=True)):
        return sft(state, world, more)


def adapted_policy(**variant: bool) -> Any:
    model = policy()
    add_adapters(model, LoraConfig(rank=4, alpha=8, **variant), seed=5)
    return model


def dpo(state: TrainState, world: World, more: dict[str, Any], reference: Callable[[], Any] = policy) -> TrainState:
    cfg = DPOConfig(prompts_per_step=3, epochs=1, nll_coef=0.3, learning_rate=RATE, warmup_steps=2, save_every=2)
    return train_dpo(cfg, state, reference(), groups(13), run_of(world, more))


def capped_policy() -> Any:
    """One that goes through transformers' own forward and through an output layer with a cap."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 16,
    }
    config = Gemma2Config(vocab_size=24, num_key_value_heads=2, **sizes, final_logit_softcapping=2.0, pad_token_id=PAD)
    torch.manual_seed(1)
    return Gemma2ForCausalLM(config).eval()


def dpo_capped(state: TrainState, world: World, more: dict[str, Any]) -> TrainState:
    return dpo(state, world, more, capped_policy)


LOSSES: dict[str, dict[str, Any]] = {
    "ipo": {"beta": 0.5},
    "ipo_sum": {},
    "conservative": {},
    "robust": {},
    "hinge": {},
    "kto": {"options": {"desirable_weight": 1.2}},
    "orpo": {"nll_coef": 1.0},
    "simpo": {"beta": 2.0},
}
"""Preference losses beside that of `dpo`, each with the settings of its own that its job has."""


def preference(loss: str) -> Train:
    """A job with another preference loss, its steps cut into forward passes."""

    def train(state: TrainState, world: World, more: dict[str, Any]) -> TrainState:
        shape = {"prompts_per_step": 5, "prompts_per_forward": 2, "learning_rate": RATE, "warmup_steps": 1}
        cfg = DPOConfig.model_validate({"loss": loss, "save_every": 2, "epochs": 2, **shape, **LOSSES[loss]})
        return train_dpo(cfg, state, policy(), groups(13), run_of(world, more))

    return train


def reward(state: TrainState, world: World, more: dict[str, Any]) -> TrainState:
    shape = {"prompts_per_step": 3, "prompts_per_forward": 1, "epochs": 1, "save_every": 2}
    cfg = RewardConfig(centering=0.01, learning_rate=RATE, warmup_steps=2, **shape)
    return train_reward(cfg, state, groups(13), run_of(world, more)).state


def ppo(state: TrainState, world: World, more: dict[str, Any]) -> TrainState:
    cfg = PPOConfig(
        steps=4,
        rollout_batch=16,
        minibatch=8,
        epochs=2,
        learning_rate=RATE,
        value_learning_rate=RATE,
        warmup_steps=1,
        save_every=1,
    )
    sampling = Sampling(eos_ids=(EOS,), pad_id=PAD, max_new_tokens=8)
    return train_ppo(cfg, state, policy(), Rewards(share_of_good), PROMPTS, run_of(world, more), sampling=sampling)


def ppo_once(state: TrainState, world: World, more: dict[str, Any]) -> TrainState:
    """One update and no more: what is reported of it was seen before anything was learned."""
    cfg = PPOConfig(
        steps=1, rollout_batch=16, minibatch=16, epochs=1, microbatch=4, learning_rate=RATE, entropy_coef=0.1
    )
    sampling = Sampling(eos_ids=(EOS,), pad_id=PAD, max_new_tokens=8)
    return train_ppo(cfg, state, policy(), Rewards(share_of_good), PROMPTS, run_of(world, more), sampling=sampling)


def ppo_remembering(state: TrainState, world: World, more: dict[str, Any]) -> TrainState:
    """With all that PPO carries from rollout to rollout: adaptive price, moments, replay, curriculum, guard."""
    cfg = PPOConfig.model_validate(
        {
            "steps": 4,
            "rollout_batch": 8,
            "minibatch": 4,
            "learning_rate": RATE,
            "value_learning_rate": RATE,
            "warmup_steps": 1,
            "save_every": 1,
            "entropy_coef": 0.01,
            "kl": {"controller": "adaptive", "target": 0.5, "horizon": 50.0, "estimator": "k3"},
            "scores": {"normalise": "running"},
            "replay": {"rows": 4, "capacity": 12},
            "curriculum": {"start_share": 0.5, "steps": 3},
            "guard": {"every": 1, "scorer": "m:f", "patience": 9},
        }
    )
    sampling = Sampling(eos_ids=(EOS,), pad_id=PAD, max_new_tokens=8)
    watch = Watch(prompts=PROMPTS[:4], rate=lambda rows: [-float(len(row.response_ids)) for row in rows])
    rewards = Rewards(share_of_good, [diversity_term(0.1)])
    run = run_of(world, more)
    return train_ppo(cfg, state, policy(), rewards, PROMPTS, run, sampling=sampling, watch=watch)


def reward_model() -> RewardModel:
    return RewardModel.from_policy(policy(), "last", seed=2)


NETWORKS: dict[str, Callable[[], dict[str, nn.Module]]] = {
    "sft": lambda: {"policy": policy()},
    "sft_lonely": lambda: {"policy": policy()},
    "sft_lora": lambda: {"policy": adapted_policy()},
    "sft_dora": lambda: {"policy": adapted_policy(use_dora=True, use_rslora=True)},
    "dpo": lambda: {"policy": policy()},
    "reward": lambda: {"reward": reward_model()},
    "ppo": lambda: {"policy": policy(), "value": ValueModel.from_reward_model(reward_model())},
}
NETWORKS["ppo_remembering"] = NETWORKS["ppo_once"] = NETWORKS["ppo"]
NETWORKS["dpo_capped"] = lambda: {"policy": capped_policy()}
NETWORKS |= dict.fromkeys(LOSSES, NETWORKS["dpo"])
TRAIN: dict[str, Train] = {
    "sft": sft,
    "sft_lonely": sft_lonely,
    "sft_lora": sft_lora,
    "sft_dora": sft_lora,
    "dpo": dpo,
    "dpo_capped": dpo_capped,
    "reward": reward,
    "ppo": ppo,
    "ppo_once": ppo_once,
    "ppo_remembering": ppo_remembering,
    **{loss: preference(loss) for loss in LOSSES},
}


BROKEN_AFTER = {"ppo_remembering": 3, **dict.fromkeys(LOSSES, 3)}
"""Steps after which a job is broken off, where it is not after 2; the losses go one step back to a checkpoint then."""


class Stop(Exception):
    """A run that is broken off."""


def finish(name: str, world: World = ALONE, *, sharded: bool = False, broken: Path | None = None) -> TrainState:
    """Train to the end; with `broken`, stop after a step and go on in fresh networks from the newest checkpoint."""
    if broken is not None:

        def stop(step: int, *_: Any) -> None:
            if step == BROKEN_AFTER.get(name, 2):
                raise Stop

        keep = Checkpointer(broken, {"job": name}, world=world)
        state, _ = begin(name, sharded)
        with suppress(Stop):
            TRAIN[name](state, world, {"log": stop, "checkpoint": keep.save})
        state, whole = begin(name, sharded)
        world.total(torch.zeros(()))  # the first process has written
        assert keep.restore(state)
        assert 2 <= state.step <= BROKEN_AFTER.get(name, 2)
    else:
        state, whole = begin(name, sharded)
    TRAIN[name](state, world, {"log": lambda *_: None, "checkpoint": lambda state: None})
    for key, module in whole.items():
        if state.modules[key] is not module:
            restore_whole(module, state.modules[key])
            state.modules[key] = module
    return state


def begin(name: str, sharded: bool) -> tuple[TrainState, dict[str, nn.Module]]:
    """A fresh state, and its networks as they were before they were divided."""
    whole = NETWORKS[name]()
    modules = {key: shard(module) if sharded else module for key, module in whole.items()}
    optimizers = {key: make_optimizer(module, RATE, 0.01) for key, module in modules.items()}
    return TrainState(modules=modules, optimizers=optimizers), whole


def weights(state: TrainState) -> dict[str, Tensor]:
    """All weights of all networks, in one namespace."""
    return {
        f"{name}/{key}": parameter.detach().cpu().clone()
        for name, module in state.modules.items()
        for key, parameter in module.named_parameters()
    }


def check_the_world(world: World) -> dict[str, Any]:
    """What one process can say of the exchanges themselves."""
    generator = torch.Generator().manual_seed(world.rank)
    numbers = torch.randn(100_003, generator=generator) * 10.0 ** torch.randint(-6, 6, (100_003,), generator=generator)
    sums = [world.total(numbers) for _ in range(2)]
    assert torch.equal(*sums), "the same sum twice"
    assert all(torch.equal(sums[0], other) for other in world.collect([sums[0]])), "the same sum everywhere"
    for count in (0, 1, world.size, 7):
        assert world.collect(world.share(range(count))) == list(range(count))
    ranks = world.total(torch.tensor([world.rank, 1]))
    return {"size": world.size, "ranks": ranks.tolist()}


def main(folder: Path, orders: list[str]) -> None:
    from rlhf_core.state.processes import Processes

    torch.set_num_threads(1)
    world = Processes(cpu=os.environ.get(DEVICE_VARIABLE) != "cuda")
    seen = check_the_world(world)
    if world.rank == 0:
        (folder / "world.json").write_text(json.dumps(seen))
    for order in orders:
        name, *how = order.split("+")
        broken = folder / f"{order}-checkpoints" if "broken" in how else None
        state = finish(name, world, sharded="sharded" in how, broken=broken)
        mine = torch.cat([tensor.flatten() for tensor in weights(state).values()])
        others = world.collect([mine])
        assert all(torch.equal(mine, other) for other in others), f"{order}: processes ended with different weights"
        assert all(row == state.history for row in world.collect([state.history])), f"{order}: different histories"
        if world.rank == 0:
            (folder / order).mkdir()
            save_file(weights(state), folder / order / "weights.safetensors")
            (folder / order / "history.json").write_text(json.dumps(state.history))
    world.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
