"""How far a policy has moved from the model it started from, measured on its own samples.

Shape suffixes: B = rows of a batch, R = response tokens.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_core.engine.batches import collate
from rlhf_core.errors import check_finite
from rlhf_core.evaluation.intervals import bounds, mean_interval, perplexity
from rlhf_core.models.mixture import PolicyMixture
from rlhf_core.rollout.logprobs import response_logprobs


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


def response_logprob_sums(
    model: PreTrainedModel | PolicyMixture,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    *,
    pad_id: int,
    batch_size: int,
) -> np.ndarray:
    """Return each response's log-probability at temperature 1, summed over its tokens, in the order given.

    Rows of like length share a batch. Policy and reference must see the same batches, and do when both are called
    with the same rows: then identical weights give a divergence of exactly 0.
    """
    sums = np.zeros(len(prompts))
    for rows, logprobs_BR in _batches(model, prompts, responses, pad_id, batch_size):
        sums[rows] = logprobs_BR.sum(1).cpu().numpy()
    return sums


def response_token_logprobs(
    model: PreTrainedModel | PolicyMixture,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    *,
    pad_id: int,
    batch_size: int,
) -> Tensor:
    """Return every response token's log-probability at temperature 1, logprobs_T in float64, response after response.

    Batches are those of `response_logprob_sums`.
    """
    told = [torch.empty(0)] * len(prompts)
    for rows, logprobs_BR in _batches(model, prompts, responses, pad_id, batch_size):
        for row, logprobs_R in zip(rows, logprobs_BR.cpu(), strict=True):
            told[row] = logprobs_R[: len(responses[row])]
    return torch.cat(told)


@torch.no_grad()
def _batches(
    model: PreTrainedModel | PolicyMixture,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    pad_id: int,
    batch_size: int,
) -> Iterator[tuple[list[int], Tensor]]:
    """Rows of like length, and their logprobs_BR in float64, 0 where a response has ended."""
    order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]) + len(responses[row]), row))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = collate([prompts[row] for row in rows], [responses[row] for row in rows], pad_id).to(model.device)
        yield rows, (response_logprobs(model, batch) * batch.response_mask_BR).double()
