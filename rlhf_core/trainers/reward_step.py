"""One step of a reward model: every response of its groups through the model once, and what the step asks of it.

Each process runs its share of the groups; what the model said of the others comes from the other processes, without a
gradient. All then compute the loss of the whole step, and each has the part of its gradient that flows through its
own rows: the parts sum to the gradient of one process.
Shape suffixes: B = responses of a step, C = criteria, D = hidden size, N = pairs.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from rlhf_core.config import RewardConfig
from rlhf_core.data.pair_table import PairTable, pair_table
from rlhf_core.data.pairs import PreferenceGroup, collate_responses
from rlhf_core.models.reward import Beside, Reading, RewardModel
from rlhf_core.objectives.uncertainty import distilled_pair_losses, distilled_score_losses, ensemble_preference
from rlhf_core.state.sharding import run_gathered
from rlhf_core.state.world import World
from rlhf_core.trainers.figures import numbers
from rlhf_core.trainers.reward_loss import centering_of, contrastive_loss, group_loss


def labelled_loss(
    cfg: RewardConfig, model: RewardModel, groups: Sequence[PreferenceGroup], pad_id: int, world: World
) -> tuple[Tensor, dict[str, float]]:
    """Loss and figures of the pairs' labels, and of the auxiliary losses that have a weight."""
    beside: list[Beside] = ["logprobs"] if cfg.auxiliary.sft_coef else []
    beside += ["states"] if cfg.auxiliary.contrastive_coef else []
    said = read_groups(model, groups, beside, pad_id, world)
    table = pair_table(groups, list(cfg.criteria)).to(said.scores_BC.device)
    loss, figures = group_loss(cfg, said.scores_BC, said.log_variances_BC, table)
    if said.logprobs_B is not None:
        figures["loss/sft"] = chosen_nll(groups, table, said.logprobs_B)
        loss = loss + cfg.auxiliary.sft_coef * figures["loss/sft"]
    if said.states_BD is not None:
        figures["loss/contrastive"] = contrastive_loss(said.states_BD, table, cfg.auxiliary.contrastive_temperature)
        loss = loss + cfg.auxiliary.contrastive_coef * figures["loss/contrastive"]
    figures["reward/score_std"] = model.head.combine(said.scores_BC).std(correction=0)
    return loss, numbers({"loss/train": loss, **figures})


def distilled_loss(
    cfg: RewardConfig,
    model: RewardModel,
    groups: Sequence[PreferenceGroup],
    teacher_MB: Tensor,
    pad_id: int,
    world: World,
) -> tuple[Tensor, dict[str, float]]:
    """Loss and figures of a student of an ensemble; preferences leave the level free, which is centred then.

    Args:
        cfg: settings; `ensemble.distill` says what is learned.
        model: the student.
        groups: of the step.
        teacher_MB: the aggregated raw scores of the step's responses in row 0, those of the members below.
        pad_id: padding token.
        world: processes that train together.
    """
    said = read_groups(model, groups, (), pad_id, world)
    scores_B, teacher_MB = said.scores_BC[:, 0], teacher_MB.to(said.scores_BC.device)
    if cfg.ensemble.distill == "scores":
        loss = distilled_score_losses(scores_B, teacher_MB[0]).mean()
    else:
        table = pair_table(groups, list(cfg.criteria)).to(scores_B.device)
        delta_MN = teacher_MB[:, table.chosen_N] - teacher_MB[:, table.rejected_N]
        sure_N = ensemble_preference(delta_MN[0], delta_MN[1:].var(0, correction=0))
        loss = distilled_pair_losses(scores_B[table.chosen_N], scores_B[table.rejected_N], sure_N).mean()
        loss = loss + cfg.centering * centering_of(cfg.loss, scores_B, table)
    centred_B, centred_teacher_B = scores_B.detach() - scores_B.mean(), teacher_MB[0] - teacher_MB[0].mean()
    figures = {
        "loss/train": loss,
        "loss/distillation": loss,
        "reward/score_std": scores_B.std(correction=0),
        "reward/teacher_gap": (centred_B - centred_teacher_B).square().mean().sqrt(),
    }
    return loss, numbers(figures)


def read_groups(
    model: RewardModel, groups: Sequence[PreferenceGroup], beside: Collection[Beside], pad_id: int, world: World
) -> Reading:
    """What the model says of every response of the groups; of this process's share with a gradient.

    A process without a share reads the first group too, so that all go through the model equally often, as a model
    whose weights are divided among them demands; nothing comes of it.
    """
    mine = world.share(range(len(groups)))
    read = [groups[place] for place in mine] or list(groups[:1])
    batch = collate_responses(read, pad_id).to(model.shift.device)
    reading = run_gathered(model, RewardModel.read, batch, beside)
    if world.size == 1:
        return reading
    sizes = [len(group.responses) for group in read]
    own = dict(zip(mine, _split(reading, sizes), strict=False))
    told = world.collect([_moved(own[place], torch.device("cpu")) for place in mine])
    parts = [own[place] if place in own else _moved(part, model.shift.device) for place, part in enumerate(told)]
    if not mine:  # a zero gradient through all that the others' gradients flow through
        nothing = sum(0.0 * values.sum() for values in reading if values is not None)
        parts[0] = parts[0]._replace(scores_BC=parts[0].scores_BC + nothing)
    return Reading(*(None if values[0] is None else torch.cat(values) for values in zip(*parts, strict=True)))


def chosen_nll(groups: Sequence[PreferenceGroup], table: PairTable, logprobs_B: Tensor) -> Tensor:
    """Mean negative log-likelihood a token of the responses that won a pair, each as often as it won.

    The term that keeps a reward model a language model (Yang et al. 2024, "Regularizing hidden states").
    """
    lengths = [len(response) for group in groups for response in group.responses]
    lengths_B = torch.tensor(lengths, dtype=torch.float32, device=logprobs_B.device)
    winners_N = table.chosen_N[~table.tie_N]
    return -logprobs_B[winners_N].sum() / lengths_B[winners_N].sum().clamp_min(1.0)


def _split(reading: Reading, sizes: list[int]) -> list[Reading]:
    """The reading of each group."""
    fields = [[None] * len(sizes) if values is None else values.split(sizes) for values in reading]
    return [Reading(*values) for values in zip(*fields, strict=True)]


def _moved(reading: Reading, device: torch.device) -> Reading:
    """The reading on a device, without its gradient."""
    return Reading(*(None if values is None else values.detach().to(device) for values in reading))
