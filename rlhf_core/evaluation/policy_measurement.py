"""What a policy is measured by: its responses, a reward model's scores of them, and their distance from a reference.

Every stage that measures a policy does it here; figures and intervals are made of the numbers elsewhere (`drift`,
`intervals`).
Shape suffixes: B = rows of a batch, R = response tokens, N = responses, T = tokens of all responses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_core.engine.batches import ROWS_AT_ONCE, WIDE_ROWS_AT_ONCE, SequenceBatch
from rlhf_core.evaluation.response_scores import read_each, reward_scores
from rlhf_core.models.adapters import has_adapters, without_adapters
from rlhf_core.models.mixture import PolicyMixture
from rlhf_core.rollout.logprobs import response_logprobs
from rlhf_core.rollout.sampler import Sampling, sample_responses
from rlhf_core.text.tokenizer import decode_response

Policy: TypeAlias = PreTrainedModel | PolicyMixture
Tokens: TypeAlias = Sequence[list[int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseSet:
    """Responses in the order of the prompts, as tokens and as text.

    Attributes:
        response_ids: sampled tokens, the end token included where the model wrote one.
        texts: the same as people read them.
        finished: whether the response ended by itself before the length limit.
    """

    model: str
    temperature: float
    response_ids: list[list[int]]
    texts: list[str]
    finished: list[bool]

    @property
    def num_tokens(self) -> list[int]:
        """Tokens of each response, the end token included."""
        return [len(ids) for ids in self.response_ids]


class ResponseLogprobs(NamedTuple):
    """Each response's log-probability in nats, float64, under the policy that wrote it and under the reference.

    Their difference is the log-ratio, whose mean estimates the KL divergence (k1 of Schulman 2020).
    """

    policy_N: np.ndarray
    reference_N: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyEvaluator:
    """Measures policies on the same prompts in the same way.

    Attributes:
        prompts: their tokens; one response is written to each.
        max_new_tokens: most tokens of a response.
        sampled_at_once: most responses that are written at once.
        scored_at_once: most responses that a model reads at once.
    """

    tokenizer: PreTrainedTokenizerBase
    prompts: Tokens
    max_new_tokens: int
    sampled_at_once: int = WIDE_ROWS_AT_ONCE
    scored_at_once: int = ROWS_AT_ONCE

    def sample(self, name: str, policy: Policy, generator: torch.Generator, *, temperature: float = 1.0) -> ResponseSet:
        """A response of the policy to each prompt; temperature 0 takes the likeliest token each time."""
        samples = sample_responses(
            policy,
            list(self.prompts),
            Sampling.of(policy, self.tokenizer, self.max_new_tokens),
            temperature=temperature,
            generator=generator,
            batch_size=self.sampled_at_once,
        )
        return ResponseSet(
            model=name,
            temperature=temperature,
            response_ids=samples.response_ids,
            texts=[decode_response(self.tokenizer, ids) for ids in samples.response_ids],
            finished=samples.finished,
        )

    def scores(self, reward_model: nn.Module, responses: ResponseSet) -> list[float]:
        """`reward_scores` of the responses."""
        pad_id, rows = self.tokenizer.pad_token_id, (self.prompts, responses.response_ids)
        return reward_scores(reward_model, *rows, pad_id=pad_id, batch_size=self.scored_at_once)

    def logprobs(self, policy: Policy, reference: Policy, responses: ResponseSet) -> ResponseLogprobs:
        """The responses under the policy that wrote them and under the reference.

        A reference that carries adapters stands for the model they were added to.
        """
        with without_adapters(reference):
            reference_N = self._summed(reference, responses)
            if policy is reference and not has_adapters(policy):
                return ResponseLogprobs(reference_N, reference_N)
        return ResponseLogprobs(self._summed(policy, responses), reference_N)

    def _summed(self, model: Policy, responses: ResponseSet) -> np.ndarray:
        pad_id, rows = self.tokenizer.pad_token_id, (self.prompts, responses.response_ids)
        return response_logprob_sums(model, *rows, pad_id=pad_id, batch_size=self.scored_at_once)


def response_logprob_sums(
    model: Policy, prompts: Tokens, responses: Tokens, *, pad_id: int, batch_size: int = ROWS_AT_ONCE
) -> np.ndarray:
    """Each response's log-probability at temperature 1, summed over its tokens in float64, in the order given.

    Policy and reference see the same batches when both are called with the same rows: then identical weights give a
    divergence of exactly 0.
    """

    def summed(batch: SequenceBatch) -> list[float]:
        return _logprobs(model, batch).sum(1).tolist()

    sums = read_each(summed, prompts, responses, pad_id=pad_id, model=model, batch_size=batch_size)
    return np.array(sums)


def response_token_logprobs(
    model: Policy, prompts: Tokens, responses: Tokens, *, pad_id: int, batch_size: int = ROWS_AT_ONCE
) -> Tensor:
    """Every response token's log-probability at temperature 1, logprobs_T in float64, response after response.

    Batches are those of `response_logprob_sums`.
    """

    def each(batch: SequenceBatch) -> list[Tensor]:
        logprobs_BR = _logprobs(model, batch).cpu()
        return [one_R[:length] for one_R, length in zip(logprobs_BR, batch.shapes.responses, strict=True)]

    return torch.cat(read_each(each, prompts, responses, pad_id=pad_id, model=model, batch_size=batch_size))


def _logprobs(model: Policy, batch: SequenceBatch) -> Tensor:
    """logprobs_BR in float64, 0 where a response has ended."""
    return (response_logprobs(model, batch) * batch.response_mask_BR).double()
