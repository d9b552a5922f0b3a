"""Learning again from what an older policy sampled: importance weights, and priorities of what to take.

Shape suffixes: B = rows, R = response tokens, M = rows in store.
"""

import torch
from torch import Tensor

from rlhf_core.objectives.kl import MAX_LOG_RATIO
from rlhf_core.objectives.masked import zero_masked


def token_importance_weights(logprobs_BR: Tensor, behaviour_logprobs_BR: Tensor, mask_BR: Tensor, cap: float) -> Tensor:
    """min(pi(token) / behaviour(token), cap), without gradient; zero under the mask.

    Truncating bounds the variance for a little bias (Ionides 2008). Multiplied with a token's loss, it stands for
    the tokens that the present policy would have drawn; on fresh samples every weight is exactly 1.
    """
    log_ratio_BR = zero_masked(logprobs_BR.detach() - behaviour_logprobs_BR, mask_BR)
    return zero_masked(log_ratio_BR.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp_max(cap), mask_BR)


def priority_probabilities(priorities_M: Tensor, exponent: float) -> Tensor:
    """priority^exponent / sum, the chance of each stored row (Schaul et al. 2016, eq. 1); exponent 0 is uniform.

    Raises ValueError for a priority that is not positive: its row could never be drawn, nor its weight be computed.
    """
    if not bool((priorities_M > 0).all()):
        raise ValueError(f"priorities must be positive, the smallest is {priorities_M.min().item()}")
    # softmax of the logarithms is the same quotient and cannot overflow
    return torch.softmax(exponent * priorities_M.log(), dim=0)


def priority_weights(probabilities_B: Tensor, num_stored: int, exponent: float) -> Tensor:
    """(1 / (num_stored * p))^exponent over its largest in the batch, weights_B <= 1 (Schaul et al. 2016, section 3.4).

    Exponent 1 undoes in full that likely rows are drawn more often; 0 leaves it.
    """
    weights_B = (num_stored * probabilities_B) ** -exponent
    return weights_B / weights_B.max()
