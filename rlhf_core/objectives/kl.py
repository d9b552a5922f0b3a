"""Sampled estimates of KL(policy || other) from the log-probabilities of the policy's own tokens.

Shape suffixes: B = rows, R = response tokens. Names follow Schulman, "Approximating KL Divergence" (2020), with
log_ratio = log policy - log other.
"""

import math
from typing import Literal

from torch import Tensor

from rlhf_core.objectives.masked import masked_sum, zero_masked

KLEstimator = Literal["k1", "k2", "k3"]

MAX_LOG_RATIO = 20.0
"""Log-ratios are held within +- this before `exp`: e^20 is 4.9e8, far outside any useful ratio and still finite."""
MAX_KL_ERROR = 0.2
"""The adaptive coefficient sees at most this relative error, so one odd batch cannot throw it (Ziegler et al. 2019)."""
LEAST_KL_FACTOR = 0.1
"""One correction leaves at least this share of the coefficient: what is 0 could never be raised by a factor again."""
KL_COEF_BOUNDS = 1e-8, 1e8
"""Where the adaptive coefficient stays: in reach of its way back, however long the target was out of reach."""


def kl_estimate(
    estimator: KLEstimator,
    logprobs_BR: Tensor,
    other_logprobs_BR: Tensor,
    mask_BR: Tensor,
    k3_cap: float | None = None,
) -> Tensor:
    """The chosen estimate per token, zero under the mask: what PPO charges, or what is reported.

    As numbers k1 and k3 are unbiased (k3 unless `k3_cap` cuts its tail) and k2 is not. As a loss to differentiate it
    is the other way round: in expectation k1's gradient vanishes and k3's is that of KL(other || policy), while k2's
    is the right one.
    """
    match estimator:
        case "k1":
            return kl_k1(logprobs_BR, other_logprobs_BR, mask_BR)
        case "k2":
            return kl_k2(logprobs_BR, other_logprobs_BR, mask_BR)
        case "k3":
            return kl_k3(logprobs_BR, other_logprobs_BR, mask_BR, k3_cap)


def kl_k1(logprobs_BR: Tensor, other_logprobs_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """The plain estimate per token: unbiased, of either sign. PPO charges this one; padding pays nothing."""
    return zero_masked(logprobs_BR - other_logprobs_BR, mask_BR)


def kl_k2(logprobs_BR: Tensor, other_logprobs_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """log_ratio^2 / 2 per token: never negative, biased at second order, symmetric in the two policies."""
    return 0.5 * kl_k1(logprobs_BR, other_logprobs_BR, mask_BR).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).square()


def kl_k3(logprobs_BR: Tensor, other_logprobs_BR: Tensor, mask_BR: Tensor, cap: float | None = None) -> Tensor:
    """exp(-log_ratio) - 1 + log_ratio per token: never negative, and unbiased while no log-ratio leaves +-20.

    Its expectation is carried by rare tokens of large value where the two policies are far apart: there it varies more
    than k1. `cap` holds each token below a number, for less variance, and then it reads too low.
    `expm1` keeps the digits that 1 - 1 would cancel near zero, so a policy that has not moved reads exactly 0.
    """
    log_ratio_BR = kl_k1(logprobs_BR, other_logprobs_BR, mask_BR).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return ((-log_ratio_BR).expm1() + log_ratio_BR).clamp(0.0, cap)


def kl_to_reference(logprobs_BR: Tensor, ref_logprobs_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """Divergence of each response in nats: the sum of k1 over its tokens. Its mean over rows estimates the true KL."""
    return masked_sum(logprobs_BR - ref_logprobs_BR, mask_BR)


def adapt_kl_coef(kl_coef: float, kl: float, target_kl: float, num_responses: int, horizon: float) -> float:
    """The next coefficient of the KL penalty: up where the policy drifts past the target, down where it falls short.

    kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) * num_responses / horizon), `kl` being nats a response, averaged
    over the `num_responses` just sampled (Ziegler et al. 2019, eq. 4; `AdaptiveKLController` of
    openai/lm-human-preferences). Two things are added. The factor is held at 0.1 or above and the coefficient within
    `KL_COEF_BOUNDS`, where a rollout of five horizons would make it 0, which no factor changes again. And a divergence
    that is not a number says nothing: the coefficient stays.
    """
    if math.isnan(kl):
        return kl_coef
    error = min(max(kl / target_kl - 1.0, -MAX_KL_ERROR), MAX_KL_ERROR)
    lowest, highest = KL_COEF_BOUNDS
    return min(max(kl_coef * max(LEAST_KL_FACTOR, 1.0 + error * num_responses / horizon), lowest), highest)
