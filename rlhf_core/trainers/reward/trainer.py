"""Reward models from labelled pairs (Ouyang et al. 2022, section 3.5): all pairs of a prompt in one step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method

from rlhf_core.config import RewardConfig
from rlhf_core.data.batching.pairs import PreferenceGroup
from rlhf_core.engine.batches import ROWS_AT_ONCE
from rlhf_core.errors import GateRefused, check_finite
from rlhf_core.evaluation.response_scores import reward_scores
from rlhf_core.models.scoring.ensemble import RewardEnsemble
from rlhf_core.models.scoring.reward_model import RewardModel
from rlhf_core.objectives.masked import rounding_variance
from rlhf_core.state.run_context import RunContext
from rlhf_core.state.sharding import is_sharded
from rlhf_core.state.train_state import TrainState
from rlhf_core.trainers.figures import reportable
from rlhf_core.trainers.optimisation import apply_gradients, set_learning_rate
from rlhf_core.trainers.reward.plan import Phase, epoch_batches, phases
from rlhf_core.trainers.reward.step import distilled_step, labelled_step
from rlhf_core.trainers.reward.teacher import Aggregation, ensemble_of, fit_aggregation, teacher_scores
from rlhf_core.trainers.schedule import learning_rate

__all__ = [
    "RunContext",
    "standardise",
    "standardise_on",
    "train_reward",
]  # what a program needs that calls the trainer alone

TEACHER = "teacher_scores"
LEAST_DEVIATION = 1e-6
"""Log-odds: scores that differ by less say nothing, whatever their size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedReward:
    """What `train_reward` made.

    Attributes:
        state: every model of the run, trained.
        aggregation: how the members of an ensemble become one score; None for a single model.
    """

    state: TrainState
    aggregation: Aggregation | None


def train_reward(
    cfg: RewardConfig, state: TrainState, groups: Sequence[PreferenceGroup], run: RunContext
) -> TrainedReward:
    """Train from `state.step` over `cfg.epochs` passes of the prompt groups, every model of the run in turn.

    `state` holds the modules of `make_models` and an optimiser of the same name for each: `reward` alone, or
    `member-0`, `member-1`, ... and, where the ensemble is distilled, `reward` for its student. Which one is trained
    follows from the step; moments of a model that is done are let go. Scores keep their natural scale, in which a
    difference is a log-odds; `standardise` comes after.

    Raises:
        Diverged: losses or gradients were not finite three times in a row, or a member's scores were not.
    """
    for module in state.modules.values():
        if is_sharded(module):
            register_fsdp_forward_method(module, "read")
    plan = phases(cfg, len(groups), run.seed)
    total, batches, aggregation = plan[-1].end, list[list[int]](), None
    while state.step < total:
        # 1. Which model: the first learns to its end, then the next; a student hears what its teachers say.
        number = next(place for place, phase in enumerate(plan) if state.step < phase.end)
        phase = plan[number]
        for done in plan[:number]:
            state.optimizers[done.name].state.clear()
        if phase.distills and TEACHER not in state.tensors:
            aggregation = _aggregation(cfg, state, groups, plan, run)
            teacher = ensemble_of(cfg, state.modules, aggregation)
            state.tensors[TEACHER] = teacher_scores(teacher, groups, run.pad_id)

        # 2. Which prompts: a pass's batches are addressed by its number, and the place in it follows from the step.
        epoch, place = divmod(state.step - phase.start, phase.steps // cfg.epochs)
        if place == 0 or not batches:
            batches = epoch_batches(cfg, groups, phase, run.seed, epoch)

        # 3. Learn from them.
        figures = _step(cfg, state, phase, groups, batches[place], run)
        figures |= {"optim/model": number} if len(plan) > 1 else {}
        state.step += 1

        # 4. Report, save. Nothing below this line changes a weight.
        state.record(figures)
        if state.step % cfg.save_every == 0 or state.step == total:
            run.checkpoint(state)
        run.log(state.step, total, figures, state.extra["tokens"])
    if cfg.ensemble.members > 1 and aggregation is None:
        aggregation = _aggregation(cfg, state, groups, plan, run)
    return TrainedReward(state=state, aggregation=aggregation)


def _aggregation(
    cfg: RewardConfig, state: TrainState, groups: Sequence[PreferenceGroup], plan: Sequence[Phase], run: RunContext
) -> Aggregation:
    """How the members become one score, now that they are trained."""
    return fit_aggregation(ensemble_of(cfg, state.modules), groups, plan, list(cfg.criteria), run.pad_id)


def _step(
    cfg: RewardConfig,
    state: TrainState,
    phase: Phase,
    groups: Sequence[PreferenceGroup],
    members: Sequence[int],
    run: RunContext,
) -> dict[str, float]:
    """Train the model of `phase` on some groups and return the figures of the step."""
    model, optimizer = cast(RewardModel, state.modules[phase.name]), state.optimizers[phase.name]
    done = state.step - phase.start
    rate = learning_rate(done, phase.steps, cfg.learning_rate, cfg.warmup_steps, cfg.min_learning_rate_share, "linear")
    set_learning_rate(optimizer, rate)
    chosen = [groups[place] for place in members]
    if phase.distills:
        teacher_MB = state.tensors[TEACHER][:, _response_places(groups, members)]
        figures = distilled_step(cfg, model, chosen, teacher_MB, run)
    else:
        figures = labelled_step(cfg, model, chosen, run)
    norm = apply_gradients(state, phase.name, figures["loss/train"], cfg.max_grad_norm, run.world)
    tokens = sum(len(group.prompt) + len(response) for group in chosen for response in group.responses)
    state.extra["tokens"] = state.extra.get("tokens", 0) + tokens
    return reportable(figures | {"optim/learning_rate": rate, "optim/grad_norm": norm})


def _response_places(groups: Sequence[PreferenceGroup], members: Sequence[int]) -> Tensor:
    """Where the responses of some groups stand when those of all groups are written one after the other."""
    sizes = [len(group.responses) for group in groups]
    places = torch.arange(sum(sizes)).split(sizes)
    return torch.cat([places[member] for member in members])


def standardise(model: RewardModel | RewardEnsemble, scores: Sequence[float]) -> None:
    """Shift and scale the model so that the given scores of its own get mean 0 and standard deviation 1.

    The scores must come from the model before any standardisation. PPO's constants (`score_clip`, `kl_coef`,
    `missing_end_penalty`) then mean the same for every reward model.

    Raises:
        Diverged: a score is no finite number.
        GateRefused: the model scores everything alike but for rounding, so there is nothing that a policy could learn
            from it, and dividing by the deviation would make a scale of the rounding.
    """
    check_finite(
        scores, "reward: the score of training response", "lower reward.learning_rate, or look at that response"
    )
    scores_B = torch.tensor(scores, dtype=torch.float64)
    deviation = scores_B.std(correction=0).item()
    if not deviation > max(LEAST_DEVIATION, rounding_variance(scores_B.mean().item(), torch.float32) ** 0.5):
        raise GateRefused(
            f"reward: the model gives all {len(scores)} training responses the same score, {scores[0]}, "
            f"give or take {deviation:.1g}. "
            "Fix: reward.learning_rate, reward.epochs or more pairs"
        )
    model.standardise(scores_B.mean().item(), deviation)


def standardise_on(
    model: RewardModel | RewardEnsemble, groups: Sequence[PreferenceGroup], pad_id: int, batch_size: int = ROWS_AT_ONCE
) -> None:
    """`standardise` by the responses of some groups, read `batch_size` at a time.

    Raises:
        GateRefused: see `standardise`.
    """
    prompts, responses = zip(*((group.prompt, one) for group in groups for one in group.responses), strict=True)
    standardise(model, reward_scores(model, prompts, responses, pad_id=pad_id, batch_size=batch_size))
