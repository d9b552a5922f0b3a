"""Sampled estimates of KL(policy || other) from the log-probabilities of the policy's own tokens.

Shape suffixes: B = rows, R = response tokens. Names follow Schulman, "Approximating KL Divergence" (2020), with
log_ratio = log policy - log other.
"""

from torch import Tensor

from rlhf_core.objectives.masked import masked_sum, zero_masked

MAX_LOG_RATIO = 20.0
"""Log-ratios are held within +- this before `exp`: e^20 is 4.9e8, far outside any useful ratio and still finite."""
MAX_K3 = 10.0
"""One token's k3 is held below this: its exponential tail would otherwise drown the mean it belongs to."""


def kl_k1(logprobs_BR: Tensor, other_logprobs_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """The plain estimate per token: unbiased, of either sign. PPO charges this one; padding pays nothing."""
    return zero_masked(logprobs_BR - other_logprobs_BR, mask_BR)


def kl_k3(logprobs_BR: Tensor, other_logprobs_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """exp(-log_ratio) - 1 + log_ratio per token: unbiased, never negative, of low variance; for reports and stopping.

    `expm1` keeps the digits that 1 - 1 would cancel near zero, so a policy that has not moved reads exactly 0.
    """
    log_ratio_BR = kl_k1(logprobs_BR, other_logprobs_BR, mask_BR).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return ((-log_ratio_BR).expm1() + log_ratio_BR).clamp(0.0, MAX_K3)


def kl_to_reference(logprobs_BR: Tensor, ref_logprobs_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """Divergence of each response in nats: the sum of k1 over its tokens. Its mean over rows estimates the true KL."""
    return masked_sum(logprobs_BR - ref_logprobs_BR, mask_BR)
