"""Which models a reward run trains, on which prompts and in which order: all a function of settings and seed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from rlhf_core.config import RewardConfig
from rlhf_core.data.batching.pairs import PreferenceGroup, group_batches
from rlhf_core.engine.batches import cut
from rlhf_core.models.scoring.heads import OVERALL_ONLY, HeadSpec
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.models.scoring.start import started_from
from rlhf_core.state.rng import StepRng
from rlhf_core.trainers.reward.ranking_losses import REWARD_LOSSES

PUBLISHED = "reward"


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """The training of one model: a single one, a member of an ensemble, or the student of one.

    Attributes:
        name: of the module and of its optimiser.
        address: of its randomness.
        drawn: places of the groups it is trained on, some of them several times under the bootstrap.
        start, end: the steps of the run that are its own.
        distills: it learns from the members' scores and not from labels.
    """

    name: str
    address: str
    drawn: tuple[int, ...]
    start: int
    end: int
    distills: bool

    @property
    def steps(self) -> int:
        """How many steps it has."""
        return self.end - self.start


def phases(cfg: RewardConfig, num_groups: int, seed: int) -> list[Phase]:
    """The models in the order they are trained, each as long as a single one."""
    steps = cfg.epochs * -(-num_groups // cfg.prompts_per_step)
    every = tuple(range(num_groups))
    found = []
    for number, name in enumerate(model_names(cfg)):
        distills = name == PUBLISHED and cfg.ensemble.members > 1
        address = PUBLISHED if name == PUBLISHED and not distills else f"{PUBLISHED}/{name}"
        drawn = every
        if cfg.ensemble.members > 1 and cfg.ensemble.resample == "bootstrap" and not distills:
            generator = StepRng(seed, address)("bootstrap")
            drawn = tuple(torch.randint(num_groups, (num_groups,), generator=generator).tolist())
        found.append(
            Phase(
                name=name,
                address=address,
                drawn=drawn,
                start=number * steps,
                end=(number + 1) * steps,
                distills=distills,
            )
        )
    return found


def model_names(cfg: RewardConfig) -> list[str]:
    """Names of the modules that are trained, the student of a distilled ensemble last."""
    if cfg.ensemble.members == 1:
        return [PUBLISHED]
    members = [f"member-{number}" for number in range(cfg.ensemble.members)]
    return members if cfg.ensemble.distill == "none" else [*members, PUBLISHED]


def make_models(cfg: RewardConfig, start: PreTrainedModel | RewardModel, rng: StepRng) -> dict[str, RewardModel]:
    """The models of a run before training, by name: on copies of one body, each with a head of its own seed.

    A student has one score, the aggregated one, and no variance.

    Args:
        start: a language model, or a reward model, whose head is then the start of each head.
    """
    models = {}
    for name in model_names(cfg):
        student = name == PUBLISHED and cfg.ensemble.members > 1
        pessimistic = cfg.ensemble.members == 1 and cfg.ensemble.aggregate == "pessimistic"
        head = HeadSpec(
            kind=cfg.head,
            criteria=dict(OVERALL_ONLY if student else cfg.criteria),
            spread=REWARD_LOSSES[cfg.loss.name].row.has_variance and not student,
            alpha=cfg.alpha,
            pessimism=cfg.ensemble.pessimism if pessimistic else 0.0,
        )
        seed = rng.integer("head" if name == PUBLISHED else f"head/{name}")
        keep_output = cfg.auxiliary.sft_coef > 0 and not student
        if isinstance(start, RewardModel):
            models[name] = started_from(start, head, seed)
        else:
            models[name] = RewardModel.from_policy(start, head, seed, keep_output=keep_output)
    return models


def epoch_batches(
    cfg: RewardConfig, groups: Sequence[PreferenceGroup], phase: Phase, seed: int, epoch: int
) -> list[list[int]]:
    """Places of the groups of each step of a pass: mixed anew in each, or strong preferences first in pass 0."""
    generator = StepRng(seed, phase.address, epoch)("groups")
    if cfg.order == "shuffled" or epoch:
        chosen = group_batches([groups[place] for place in phase.drawn], cfg.prompts_per_step, generator)
        return [[phase.drawn[place] for place in batch] for batch in chosen]
    mixed = [phase.drawn[place] for place in torch.randperm(len(phase.drawn), generator=generator).tolist()]
    ordered = sorted(mixed, key=lambda place: -strength(groups[place]))
    return cut(ordered, cfg.prompts_per_step)


def strength(group: PreferenceGroup) -> float:
    """Mean vote strength of a prompt's pairs; a tie has none."""
    return sum(abs(label.margin) for label in group.labels) / len(group.labels)
