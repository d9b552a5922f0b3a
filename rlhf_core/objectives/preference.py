"""Losses that learn a policy from pairs directly.

Shape suffixes: B = rows (one pair each), R = response tokens.
"""

import torch.nn.functional as F
from torch import Tensor

from rlhf_core.objectives.masked import masked_mean


def dpo_loss(
    policy_chosen_B: Tensor,
    policy_rejected_B: Tensor,
    reference_chosen_B: Tensor,
    reference_rejected_B: Tensor,
    beta: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """DPO on summed response log-probabilities (Rafailov et al. 2023, eq. 7).

    L = -mean log sigmoid(beta * [(log pi(c) - log ref(c)) - (log pi(r) - log ref(r))]); a policy equal to its
    reference gives ln 2. Statistics, detached: the implicit rewards `reward/chosen` and `reward/rejected`
    (beta * log-ratio), their difference `reward/margin`, and `reward/accuracy` with ties counted as half.
    """
    chosen_reward_B = beta * (policy_chosen_B - reference_chosen_B)
    rejected_reward_B = beta * (policy_rejected_B - reference_rejected_B)
    margin_B = chosen_reward_B - rejected_reward_B
    stats = {
        "reward/chosen": chosen_reward_B.mean(),
        "reward/rejected": rejected_reward_B.mean(),
        "reward/margin": margin_B.mean(),
        "reward/accuracy": (0.5 * (margin_B.sign() + 1.0)).mean(),
    }
    # logsigmoid, not log(sigmoid): the latter is -inf from a margin of about -104 on, in float32.
    return -F.logsigmoid(margin_B).mean(), {name: value.detach() for name, value in stats.items()}


def chosen_nll(chosen_logprobs_BR: Tensor, chosen_mask_BR: Tensor) -> Tensor:
    """Negative log-likelihood of the chosen responses, per token (Pang et al. 2024, eq. 2, normalised over the batch).

    Beside DPO's loss, which only asks for a difference, it keeps the chosen response itself likely and well formed.
    """
    return -masked_mean(chosen_logprobs_BR, chosen_mask_BR)
