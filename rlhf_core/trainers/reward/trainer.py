"""Reward models from labelled pairs (Ouyang et al. 2022, section 3.5): all pairs of a prompt in one step."""

from collections.abc import Sequence
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
from rlhf_core.state.sharding import is_sharded
from rlhf_core.state.train_state import MetricSink, SaveCheckpoint, TrainState, unheard, unkept
from rlhf_core.state.world import ALONE, World
from rlhf_core.trainers.figures import reportable
from rlhf_core.trainers.optimisation import apply_gradients, set_learning_rate
from rlhf_core.trainers.reward.plan import Phase, ensemble_of, epoch_batches, phases
from rlhf_core.trainers.reward.step import distilled_step, labelled_step
from rlhf_core.trainers.reward.teacher import fit_aggregation, teacher_scores
from rlhf_core.trainers.schedule import learning_rate

TEACHER = "teacher_scores"
LEAST_DEVIATION = 1e-6
"""Log-odds: scores that differ by less say nothing, whatever their size."""


def train_reward(
    cfg: RewardConfig,
    state: TrainState,
    groups: Sequence[PreferenceGroup],
    *,
    seed: int,
    pad_id: int,
    log: MetricSink = unheard,
    checkpoint: SaveCheckpoint = unkept,
    world: World = ALONE,
) -> TrainState:
    """Train from `state.step` over `cfg.epochs` passes of the prompt groups, every model of the run in turn.

    `state` holds the modules of `make_models` and an optimiser of the same name for each: `reward` alone, or
    `member-0`, `member-1`, ... and, where the ensemble is distilled, `reward` for its student. Which one is trained
    follows from the step; moments of a model that is done are let go. Scores keep their natural scale, in which a
    difference is a log-odds; `standardise` comes after.

    Raises:
        Diverged: losses or gradients were not finite three times in a row.
    """
    for module in state.modules.values():
        if is_sharded(module):
            register_fsdp_forward_method(module, "read")
    plan = phases(cfg, len(groups), seed)
    for number, phase in enumerate(plan):
        for done in plan[:number]:
            state.optimizers[done.name].state.clear()
        if phase.distills and TEACHER not in state.tensors:
            ensemble = ensemble_of(cfg, state.modules)
            fit_aggregation(ensemble, groups, plan, list(cfg.criteria), pad_id)
            state.tensors[TEACHER] = teacher_scores(ensemble, groups, pad_id)
        while state.step < phase.end:
            epoch, place = divmod(state.step - phase.start, (phase.end - phase.start) // cfg.epochs)
            for members in epoch_batches(cfg, groups, phase, seed, epoch)[place:]:
                figures = _step(cfg, state, phase, groups, members, pad_id, world)
                if len(plan) > 1:
                    figures["optim/model"] = number
                state.step += 1
                state.record(figures)
                if state.step % cfg.save_every == 0 or state.step == plan[-1].end:
                    checkpoint(state)
                log(state.step, plan[-1].end, figures, state.extra["tokens"])
    return state


def _step(
    cfg: RewardConfig,
    state: TrainState,
    phase: Phase,
    groups: Sequence[PreferenceGroup],
    members: Sequence[int],
    pad_id: int,
    world: World,
) -> dict[str, float]:
    """Train the model of `phase` on some groups and return the figures of the step."""
    model, optimizer = cast(RewardModel, state.modules[phase.name]), state.optimizers[phase.name]
    steps = phase.end - phase.start
    rate = learning_rate(
        state.step - phase.start, steps, cfg.learning_rate, cfg.warmup_steps, cfg.min_learning_rate_share, "linear"
    )
    set_learning_rate(optimizer, rate)
    chosen = [groups[place] for place in members]
    if phase.distills:
        teacher_MB = state.tensors[TEACHER][:, _response_places(groups, members)]
        figures = distilled_step(cfg, model, chosen, teacher_MB, pad_id, world)
    else:
        figures = labelled_step(cfg, model, chosen, pad_id, world)
    norm = apply_gradients(state, phase.name, figures["loss/train"], cfg.max_grad_norm, world)
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
