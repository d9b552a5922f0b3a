"""Losses that learn a score from comparisons.

Shape suffixes: B = scored responses, N = pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(chosen_scores_N: Tensor, rejected_scores_N: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of the choices (Bradley & Terry 1952; Ouyang et al. 2022, eq. 1).

    L = -mean log sigmoid(s_chosen - s_rejected), the difference taken in float32 or wider.
    Statistics, detached: `reward/margin` and `reward/accuracy`, in which a tie of the scores counts half.
    """
    wide = torch.promote_types(chosen_scores_N.dtype, torch.float32)
    margin_N = chosen_scores_N.to(wide) - rejected_scores_N.to(wide)
    stats = {"reward/margin": margin_N.mean(), "reward/accuracy": (0.5 * (margin_N.sign() + 1.0)).mean()}
    return -F.logsigmoid(margin_N).mean(), {name: value.detach() for name, value in stats.items()}


def centering_loss(scores_B: Tensor) -> Tensor:
    """Mean squared score: comparisons leave the level of the scores free, this ties it near zero."""
    return scores_B.square().mean()
