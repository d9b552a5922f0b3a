"""One model's responses to the evaluation prompts at one temperature, and what the judges make of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_core.demo.gold import Grade
from rlhf_core.rollout.sampler import Sampling, sample_responses
from rlhf_core.text.tokenizer import decode_response


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


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedSet:
    """A response set with its scores by judge, and the gold grades where gold is a judge."""

    responses: ResponseSet
    scores: dict[str, list[float]]
    grades: list[Grade] = field(default_factory=list)


def sample_response_set(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    temperature: float,
    max_new_tokens: int,
    batch_size: int,
    generator: torch.Generator,
) -> ResponseSet:
    """Sample one response a prompt from `model`; temperature 0 takes the likeliest token each time."""
    samples = sample_responses(
        model,
        list(prompts),
        Sampling.of(model, tokenizer, max_new_tokens),
        temperature=temperature,
        generator=generator,
        batch_size=batch_size,
    )
    return ResponseSet(
        model=name,
        temperature=temperature,
        response_ids=samples.response_ids,
        texts=[decode_response(tokenizer, ids) for ids in samples.response_ids],
        finished=samples.finished,
    )
