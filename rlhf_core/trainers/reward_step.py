"""One step of a reward model: every response of its groups through the model once, and what the step asks of it.

Each process runs its share of the groups; what the model said of the others comes from the other processes, without a
gradient. All then compute the loss of the whole step, and each has the part of its gradient that flows through its
own rows: the parts sum to the gradient of one process.
Shape suffixes: B = responses of a step, C = criteria, D = hidden size, N = pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_core.config import RewardConfig
from rlhf_core.data.batches import SequenceBatch
from rlhf_core.data.pair_table import PairTable, pair_table
from rlhf_core.data.pairs import PreferenceGroup, collate_groups
from rlhf_core.models.heads import mean_state
from rlhf_core.models.reward import RewardModel
from rlhf_core.models.states import response_states
from rlhf_core.objectives.masked import masked_sum
from rlhf_core.objectives.uncertainty import distilled_pair_losses, distilled_score_losses, ensemble_preference
from rlhf_core.state.world import World
from rlhf_core.trainers.reward_loss import contrastive_loss, group_loss


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """What a model says of the responses of a step; what nobody asked for is None.

    Attributes:
        scores_BC: raw scores.
        log_variances_BC: of the scores.
        states_BD: mean hidden state of each response.
        logprobs_B: log-probability of each response under the body.
    """

    scores_BC: Tensor
    log_variances_BC: Tensor | None = None
    states_BD: Tensor | None = None
    logprobs_B: Tensor | None = None


def labelled_loss(
    cfg: RewardConfig, model: RewardModel, groups: Sequence[PreferenceGroup], pad_id: int, world: World
) -> tuple[Tensor, dict[str, float]]:
    """Loss and figures of the pairs' labels, and of the auxiliary losses that have a weight."""
    said = across(world, groups, ask(cfg, model, world.share(groups), pad_id))
    table = pair_table(groups, list(cfg.criteria)).to(said.scores_BC.device)
    loss, figures = group_loss(cfg, said.scores_BC, said.log_variances_BC, table)
    if said.logprobs_B is not None:
        figures["loss/sft"] = chosen_nll(groups, table, said.logprobs_B)
        loss = loss + cfg.auxiliary.sft_coef * figures["loss/sft"]
    if said.states_BD is not None:
        figures["loss/contrastive"] = contrastive_loss(said.states_BD, table, cfg.auxiliary.contrastive_temperature)
        loss = loss + cfg.auxiliary.contrastive_coef * figures["loss/contrastive"]
    figures["reward/score_std"] = model.head.combine(said.scores_BC).std(correction=0)
    return loss, {"loss/train": loss.item(), **{key: value.item() for key, value in figures.items()}}


def distilled_loss(
    cfg: RewardConfig,
    model: RewardModel,
    groups: Sequence[PreferenceGroup],
    teacher_MB: Tensor,
    pad_id: int,
    world: World,
) -> tuple[Tensor, dict[str, float]]:
    """Loss and figures of a student of an ensemble.

    Args:
        cfg: settings; `ensemble.distill` says what is learned.
        model: the student.
        groups: of the step.
        teacher_MB: the aggregated raw scores of the step's responses in row 0, those of the members below.
        pad_id: padding token.
        world: processes that train together.
    """
    said = across(world, groups, ask(RewardConfig(), model, world.share(groups), pad_id))
    scores_B, teacher_MB = said.scores_BC[:, 0], teacher_MB.to(said.scores_BC.device)
    if cfg.ensemble.distill == "scores":
        loss = distilled_score_losses(scores_B, teacher_MB[0]).mean()
    else:
        table = pair_table(groups, list(cfg.criteria)).to(scores_B.device)
        delta_MN = teacher_MB[:, table.chosen_N] - teacher_MB[:, table.rejected_N]
        sure_N = ensemble_preference(delta_MN[0], delta_MN[1:].var(0, correction=0))
        loss = distilled_pair_losses(scores_B[table.chosen_N], scores_B[table.rejected_N], sure_N).mean()
    centred_B, centred_teacher_B = scores_B.detach() - scores_B.mean(), teacher_MB[0] - teacher_MB[0].mean()
    figures = {
        "loss/train": loss,
        "loss/distillation": loss,
        "reward/score_std": scores_B.std(correction=0),
        "reward/teacher_gap": (centred_B - centred_teacher_B).square().mean().sqrt(),
    }
    return loss, {key: value.item() for key, value in figures.items()}


def ask(cfg: RewardConfig, model: RewardModel, groups: Sequence[PreferenceGroup], pad_id: int) -> list[Said]:
    """What the model says of each group's responses, in the order of the groups."""
    if not groups:
        return []
    device = model.shift.device
    batch = collate_groups(groups, pad_id)[0].to(device)
    joint, contrast = cfg.auxiliary.sft_coef > 0, cfg.auxiliary.contrastive_coef > 0
    states_BCD = response_states(model.body, batch) if joint or contrast else model.states(batch)
    parts: dict[str, Tensor] = {"scores_BC": model.criterion_scores(states_BCD, batch)}
    if model.spec.spread:
        parts["log_variances_BC"] = model.head.log_variances(states_BCD, batch.response_mask_BR)
    if contrast:
        parts["states_BD"] = mean_state(states_BCD, batch.response_mask_BR)
    if joint:
        parts["logprobs_B"] = _summed_logprobs(model, states_BCD, batch)
    sizes = [len(group.responses) for group in groups]
    split = {name: values.split(sizes) for name, values in parts.items()}
    return [Said(**{name: pieces[place] for name, pieces in split.items()}) for place in range(len(groups))]


def across(world: World, groups: Sequence[PreferenceGroup], mine: Sequence[Said]) -> Said:
    """What was said of all groups of a step, those of this process with their gradient."""
    if world.size == 1:
        return _joined(mine)
    own = dict(zip(world.share(range(len(groups))), mine, strict=True))
    device = mine[0].scores_BC.device if mine else torch.device("cpu")
    everyone = world.collect([_detached(one) for one in mine])
    return _joined([own.get(place) or _moved(one, device) for place, one in enumerate(everyone)])


def chosen_nll(groups: Sequence[PreferenceGroup], table: PairTable, logprobs_B: Tensor) -> Tensor:
    """Mean negative log-likelihood a token of the responses that won a pair, each as often as it won.

    The term that keeps a reward model a language model (Yang et al. 2024, "Regularizing hidden states").
    """
    lengths = [len(response) for group in groups for response in group.responses]
    lengths_B = torch.tensor(lengths, dtype=torch.float32, device=logprobs_B.device)
    winners_N = table.chosen_N[~table.tie_N]
    return -logprobs_B[winners_N].sum() / lengths_B[winners_N].sum().clamp_min(1.0)


def _summed_logprobs(model: RewardModel, states_BCD: Tensor, batch: SequenceBatch) -> Tensor:
    return masked_sum(model.own_logprobs(states_BCD, batch), batch.response_mask_BR)


def _joined(parts: Sequence[Said]) -> Said:
    pieces = {name: [getattr(one, name) for one in parts] for name in Said.__slots__}
    return Said(**{name: torch.cat(values) for name, values in pieces.items() if values[0] is not None})


def _detached(said: Said) -> Said:
    return _moved(said, torch.device("cpu"))


def _moved(said: Said, device: torch.device) -> Said:
    parts = {name: getattr(said, name) for name in Said.__slots__}
    return Said(**{name: None if part is None else part.detach().to(device) for name, part in parts.items()})
