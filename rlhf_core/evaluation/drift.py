"""How far a policy has moved from the model it started from, measured on its own samples: the figures.

Where the log-probabilities come from: `policy_measurement.PolicyEvaluator.logprobs`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_core.errors import check_finite
from rlhf_core.evaluation.intervals import bounds, mean_interval, perplexity


def drift_figures(
    logprobs: np.ndarray, reference_logprobs: np.ndarray, num_tokens: Sequence[int], confidence: float = 0.95
) -> dict[str, Any]:
    """Return the KL divergence to the reference on samples drawn from the policy at temperature 1.

    Args:
        logprobs: summed log-probability of each response under the policy, in nats.
        reference_logprobs: the same under the reference.
        num_tokens: tokens of each response, the end token included.
        confidence: level of the interval.

    Returns:
        `kl_to_sft`: mean over responses of log p - log reference, an unbiased estimate (k1 of Schulman 2020) that
        may fall below 0 by chance; `kl_to_sft_low`, `kl_to_sft_high`: its interval (`intervals.mean_interval`),
        `None` for fewer than five responses; `kl_per_token`: the summed difference over all tokens;
        `perplexity_under_sft`: what the reference makes of the samples, a token.

    Raises:
        Diverged: a log-probability is no finite number: its mean would pass every bound on the divergence.
    """
    check_finite(logprobs, "drift: the policy's log-probability of response")
    check_finite(reference_logprobs, "drift: the reference's log-probability of response")
    difference = np.asarray(logprobs, dtype=np.float64) - np.asarray(reference_logprobs, dtype=np.float64)
    tokens = int(sum(num_tokens))
    return {
        "kl_to_sft": float(difference.mean()),
        **bounds("kl_to_sft", mean_interval(difference, confidence)),
        "kl_per_token": float(difference.sum()) / tokens,
        "perplexity_under_sft": perplexity(-float(np.sum(reference_logprobs)) / tokens),
    }
