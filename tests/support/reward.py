"""Toy preferences and runs for the tests of reward models."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from rlhf_core.config.reward import RewardConfig
from rlhf_core.data.batching.pairs import PairLabel, PreferenceGroup, PreferencePair, group_pairs
from rlhf_core.state.run_context import RunContext
from rlhf_core.state.train_state import TrainState
from rlhf_core.state.world import ALONE, World
from rlhf_core.trainers.reward.trainer import train_reward

PAD, EOS, GOOD, FAIR, BAD = 0, 1, 5, 4, 6


def toy_groups(
    count: int, seed: int, *, tied: bool = False, criteria: Sequence[str] = ("overall",)
) -> list[PreferenceGroup]:
    """Three responses a prompt, with GOOD, FAIR or BAD somewhere in noise, and all their pairs on every criterion.

    On the second criterion the order is the other way round. With `tied`, FAIR against BAD is a tie.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, number: int) -> list[int]:
        return torch.randint(low, high, (number,), generator=generator).tolist()

    pairs = []
    for _ in range(count):
        prompt, responses = draw(7, 24, draw(1, 7, 1)[0]), []
        for token in (GOOD, FAIR, BAD):
            noise = draw(7, 24, draw(1, 5, 1)[0])
            place = draw(0, len(noise) + 1, 1)[0]
            responses.append([*noise[:place], token, *noise[place:], EOS])
        for (better, worse), (place, name) in itertools.product(
            itertools.combinations(range(3), 2), enumerate(criteria)
        ):
            chosen, rejected = (worse, better) if place else (better, worse)
            tie = tied and better == 1
            label = PairLabel(
                margin=0.0 if tie else float(worse - better),
                agreement=0.6 + 0.2 * (worse - better),
                criterion=name,
                tie=tie,
            )
            pairs.append(
                PreferencePair(prompt=prompt, chosen=responses[chosen], rejected=responses[rejected], label=label)
            )
    return group_pairs(pairs)


def settings(**more: Any) -> RewardConfig:
    return RewardConfig.model_validate(
        {"epochs": 2, "prompts_per_step": 8, "learning_rate": 8e-3, "warmup_steps": 3, "save_every": 3, **more}
    )


def train(cfg: RewardConfig, state: TrainState, groups: Sequence[PreferenceGroup], world: World = ALONE) -> TrainState:
    return train_reward(cfg, state, groups, RunContext(seed=0, pad_id=PAD, world=world)).state
