"""Bradley-Terry reward model (Ouyang et al. 2022, section 3.5): all pairs of a prompt in one step.

Shape suffixes: B = responses of a step, N = pairs of a step.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_core.config import RewardConfig
from rlhf_core.data.pairs import PreferenceGroup, collate_groups, group_batches
from rlhf_core.errors import GateRefused
from rlhf_core.models.reward import RewardModel
from rlhf_core.objectives.ranking import bradley_terry_loss, centering_loss
from rlhf_core.state.rng import StepRng
from rlhf_core.state.train_state import MetricSink, SaveCheckpoint, TrainState
from rlhf_core.trainers.figures import reportable
from rlhf_core.trainers.optimisation import apply_gradients, set_learning_rate
from rlhf_core.trainers.schedule import learning_rate


def train_reward(
    cfg: RewardConfig,
    state: TrainState,
    groups: Sequence[PreferenceGroup],
    *,
    seed: int,
    pad_id: int,
    log: MetricSink,
    checkpoint: SaveCheckpoint,
) -> TrainState:
    """Train from `state.step` over `cfg.epochs` passes of the prompt groups.

    `state` holds the module (a `RewardModel`) and the optimiser `reward`. Scores keep their natural scale, in which
    a difference is a log-odds; `standardise` comes after.

    Raises:
        Diverged: losses or gradients were not finite three times in a row.
    """
    model, optimizer = state.modules["reward"], state.optimizers["reward"]
    device = next(model.parameters()).device
    steps_per_epoch = len(group_batches(groups, cfg.prompts_per_step, torch.Generator()))
    total = cfg.epochs * steps_per_epoch
    for epoch in range(state.step // steps_per_epoch, cfg.epochs):
        batches = group_batches(groups, cfg.prompts_per_step, StepRng(seed, "reward", epoch)("groups"))
        for members in batches[state.step % steps_per_epoch :]:
            rate = learning_rate(
                state.step, total, cfg.learning_rate, cfg.warmup_steps, cfg.min_learning_rate_share, "linear"
            )
            set_learning_rate(optimizer, rate)
            batch, chosen_N, rejected_N = collate_groups([groups[i] for i in members], pad_id)
            loss, figures = group_loss(cfg, model(batch.to(device)), chosen_N.to(device), rejected_N.to(device))
            loss.backward()
            norm = apply_gradients(state, "reward", loss.item(), cfg.max_grad_norm)
            figures = reportable(figures | {"optim/learning_rate": rate, "optim/grad_norm": norm})

            state.extra["tokens"] = state.extra.get("tokens", 0) + batch.num_tokens
            state.step += 1
            state.record(figures)
            if state.step % cfg.save_every == 0 or state.step == total:
                checkpoint(state)
            log(state.step, total, figures, state.extra["tokens"])
    return state


def group_loss(
    cfg: RewardConfig, scores_B: Tensor, chosen_N: Tensor, rejected_N: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """Bradley-Terry over the pairs plus `cfg.centering` times the mean squared score."""
    ranking, stats = bradley_terry_loss(scores_B[chosen_N], scores_B[rejected_N])
    loss = ranking + cfg.centering * centering_loss(scores_B)
    figures = {"loss/train": loss, "loss/ranking": ranking, "reward/score_std": scores_B.std(correction=0), **stats}
    return loss, {key: value.item() for key, value in figures.items()}


def standardise(model: RewardModel, scores: Sequence[float]) -> None:
    """Shift and scale the model so that the given scores of its own get mean 0 and standard deviation 1.

    The scores must come from the model before any standardisation. PPO's constants (`score_clip`, `kl_coef`,
    `missing_end_penalty`) then mean the same for every reward model.

    Raises:
        GateRefused: the model scores everything alike, so there is nothing that a policy could learn from it.
    """
    scores_B = torch.tensor(scores, dtype=torch.float64)
    deviation = scores_B.std(correction=0).item()
    if not deviation > 0:
        raise GateRefused(
            f"reward: the model gives all {len(scores)} training responses the same score, {scores[0]}. "
            "Fix: reward.learning_rate, reward.epochs or more pairs"
        )
    model.standardise(scores_B.mean().item(), deviation)
