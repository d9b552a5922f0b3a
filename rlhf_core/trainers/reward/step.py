"""What one step of a reward model asks: of labelled pairs, or of an ensemble's scores.

Shape suffixes: B = responses of a step, C = criteria, M = members and their aggregate, N = pairs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_core.config import RewardConfig
from rlhf_core.data.batching.pair_table import PairTable, pair_table
from rlhf_core.data.batching.pairs import PreferenceGroup
from rlhf_core.models.scoring.reward_model import Beside, RewardModel, RewardOutput
from rlhf_core.objectives.uncertainty import distilled_pair_losses, distilled_score_losses, ensemble_preference
from rlhf_core.state.run_context import RunContext
from rlhf_core.trainers.reward.loss import centering_of, contrastive_loss, group_loss
from rlhf_core.trainers.reward.passes import StepLoss, lay_gradient


def labelled_step(
    cfg: RewardConfig, model: RewardModel, groups: Sequence[PreferenceGroup], run: RunContext
) -> dict[str, float]:
    """Add the gradient of the pairs' labels, and of the auxiliary losses that have a weight; return the figures."""
    beside: list[Beside] = ["logprobs"] if cfg.auxiliary.sft_coef else []
    beside += ["states"] if cfg.auxiliary.contrastive_coef else []
    table = pair_table(groups, list(cfg.criteria)).to(model.shift.device)

    def loss_of(said: RewardOutput) -> tuple[Tensor, dict[str, Tensor]]:
        loss, figures = group_loss(cfg, said.scores_BC, said.log_variances_BC, table)
        if said.logprobs_B is not None:
            figures["loss/sft"] = chosen_nll(groups, table, said.logprobs_B)
            loss = loss + cfg.auxiliary.sft_coef * figures["loss/sft"]
        if said.states_BD is not None:
            figures["loss/contrastive"] = contrastive_loss(said.states_BD, table, cfg.auxiliary.contrastive_temperature)
            loss = loss + cfg.auxiliary.contrastive_coef * figures["loss/contrastive"]
        figures["reward/score_std"] = model.head.combine(said.scores_BC).std(correction=0)
        return loss, figures

    coupled = cfg.loss.weights == "difficulty" or cfg.auxiliary.contrastive_coef > 0
    step_loss = StepLoss(of=loss_of, beside=beside, coupled=coupled)
    return lay_gradient(model, groups, step_loss, cfg.prompts_per_forward, run)


def distilled_step(
    cfg: RewardConfig,
    model: RewardModel,
    groups: Sequence[PreferenceGroup],
    teacher_MB: Tensor,
    run: RunContext,
) -> dict[str, float]:
    """The same for a student of an ensemble; preferences leave the level free, which is centred then.

    Args:
        cfg: settings; `ensemble.distill` says what is learned.
        model: the student.
        groups: of the step.
        teacher_MB: the aggregated raw scores of the step's responses in row 0, those of the members below.
        run: padding token, and the processes that train together.
    """
    teacher_MB = teacher_MB.to(model.shift.device)
    table = pair_table(groups, list(cfg.criteria)).to(teacher_MB.device)

    def loss_of(said: RewardOutput) -> tuple[Tensor, dict[str, Tensor]]:
        scores_B = said.scores_BC[:, 0]
        if cfg.ensemble.distill == "scores":
            loss = distilled_score_losses(scores_B, teacher_MB[0]).mean()
        else:
            delta_MN = teacher_MB[:, table.chosen_N] - teacher_MB[:, table.rejected_N]
            sure_N = ensemble_preference(delta_MN[0], delta_MN[1:].var(0))
            loss = distilled_pair_losses(scores_B[table.chosen_N], scores_B[table.rejected_N], sure_N).mean()
            loss = loss + cfg.centering * centering_of(cfg.loss, scores_B, table)
        centred_B, centred_teacher_B = scores_B.detach() - scores_B.mean(), teacher_MB[0] - teacher_MB[0].mean()
        return loss, {
            "loss/distillation": loss,
            "reward/score_std": scores_B.std(correction=0),
            "reward/teacher_gap": (centred_B - centred_teacher_B).square().mean().sqrt(),
        }

    return lay_gradient(model, groups, StepLoss(of=loss_of), cfg.prompts_per_forward, run)


def chosen_nll(groups: Sequence[PreferenceGroup], table: PairTable, logprobs_B: Tensor) -> Tensor:
    """Mean negative log-likelihood a token of the responses that won a pair, each as often as it won.

    The term that keeps a reward model a language model (Yang et al. 2024, "Regularizing hidden states").
    """
    lengths = [len(response) for group in groups for response in group.responses]
    lengths_B = torch.tensor(lengths, dtype=torch.float32, device=logprobs_B.device)
    winners_N = table.chosen_N[~table.tie_N]
    return -logprobs_B[winners_N].sum() / lengths_B[winners_N].sum().clamp_min(1.0)
