"""KTO: a policy learns from single responses that people liked or disliked, with no pair at all.

Shape suffixes: B = rows.
"""

import torch
from torch import Tensor

from rlhf_core.objectives.masked import SumOver, here


def kto_losses(
    policy_B: Tensor,
    reference_B: Tensor,
    desirable_B: Tensor,
    baseline: Tensor | float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """weight * (1 - value) of each response, losses_B (Ethayarajh et al. 2024, eq. 8).

    value = sigmoid(beta * (log-ratio - baseline)) where the response is desirable, sigmoid(beta * (baseline -
    log-ratio)) where it is not; log-ratios are of summed log-probabilities. `baseline` is `kto_baseline`.
    Statistics, detached: `implicit_reward/each` (beta * log-ratio).
    """
    log_ratio_B = policy_B - reference_B
    desirable_B = desirable_B.bool()
    above_B = torch.where(desirable_B, log_ratio_B - baseline, baseline - log_ratio_B)
    # 1 - sigmoid(x) is sigmoid(-x), which keeps its digits where the former would round to 0
    losses_B = torch.sigmoid(-beta * above_B)
    weighted_B = torch.where(desirable_B, desirable_weight * losses_B, undesirable_weight * losses_B)
    return weighted_B, {"implicit_reward/each": beta * log_ratio_B.detach()}


@torch.no_grad()
def kto_baseline(policy_B: Tensor, reference_B: Tensor, across: SumOver = here) -> Tensor:
    """KTO's reference point: the policy's divergence, estimated on responses that belong to OTHER prompts.

    max(0, mean of log policy - log reference) over the rows of all processes (Ethayarajh et al. 2024, section 4.1):
    biased, cheap, and without gradient. The clamp comes after the sum over processes.
    """
    count = across(policy_B.new_tensor(float(len(policy_B))))
    return (across((policy_B - reference_B).sum()) / count).clamp_min(0.0)
