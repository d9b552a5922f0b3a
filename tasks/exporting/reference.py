"""What a version itself writes on the prompts, by this project's own engine: the measure of every export."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_core.engine.batches import collate
from rlhf_core.rollout.logprobs import response_logprobs
from rlhf_core.rollout.sampler import Sampling, sample_responses
from rlhf_core.text.control import has_control
from rlhf_core.text.tokenizer import encode_prompts
from rlhf_core.text.transcripts import conversation, is_dialogue
from tasks.exporting.prompts import Pair
from tasks.exporting.subject import Subject

NEW_TOKENS = 64
"""Most tokens that are written for a prompt; fewer where the version was trained to write fewer."""
ROWS_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """A policy's own answers.

    Attributes:
        rows: for each prompt its `text`, `turns` (None without a chat template), `tools`, `ids`, greedy `response`, and
            whether a stranger is to make the same tokens of it (`is_plain`): of prompts that were cut, hold control
            tokens as text, or are dialogues without a template this project's own reading differs on purpose.
        logprobs: of each response token, in float64.
        ends, pad: token ids that end a response, and that fill up.
        new_tokens: the longest response.
    """

    rows: tuple[dict[str, Any], ...]
    logprobs: tuple[tuple[float, ...], ...]
    ends: tuple[int, ...]
    pad: int
    new_tokens: int

    @property
    def responses(self) -> list[list[int]]:
        """Greedy responses."""
        return [row["response"] for row in self.rows]


def answers_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, subject: Subject, texts: Sequence[Pair]
) -> Reference:
    """Let a policy answer; its weights are float64 afterwards.

    Raises:
        DataError: a prompt without tokens.
        Diverged: the model's logits are not numbers.
    """
    sampling = _sampling(model, tokenizer, subject)
    rows = _rows(tokenizer, [prompt for prompt, _ in texts], subject.limit("max_prompt_tokens"))
    ids = [row["ids"] for row in rows]
    written = _greedy(model, ids, sampling)
    return Reference(
        rows=tuple({**row, "response": response} for row, response in zip(rows, written, strict=True)),
        logprobs=tuple(_weighed(model.double(), ids, written, sampling.pad_id)),
        ends=sampling.eos_ids,
        pad=sampling.pad_id,
        new_tokens=sampling.max_new_tokens,
    )


def greedy_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, subject: Subject, texts: Sequence[Pair]
) -> list[list[int]]:
    """Greedy responses alone, of a model that is left as it is."""
    prompts = encode_prompts(tokenizer, [prompt for prompt, _ in texts], subject.limit("max_prompt_tokens"))
    return _greedy(model, prompts, _sampling(model, tokenizer, subject))


def _sampling(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, subject: Subject) -> Sampling:
    return Sampling.of(model, tokenizer, min(subject.limit("max_response_tokens"), NEW_TOKENS))


def _greedy(model: PreTrainedModel, prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
    size, generator = 2 * ROWS_AT_ONCE, torch.Generator()
    return sample_responses(
        model, prompts, sampling, temperature=0.0, generator=generator, batch_size=size
    ).response_ids


@torch.no_grad()
def _weighed(
    model: PreTrainedModel, prompts: list[list[int]], responses: list[list[int]], pad: int
) -> list[tuple[float, ...]]:
    found: list[tuple[float, ...]] = []
    for start in range(0, len(prompts), ROWS_AT_ONCE):
        piece = slice(start, start + ROWS_AT_ONCE)
        logprobs_BR = response_logprobs(model, collate(prompts[piece], responses[piece], pad))
        found += [tuple(row[: len(one)].tolist()) for row, one in zip(logprobs_BR, responses[piece], strict=True)]
    return found


def _rows(tokenizer: PreTrainedTokenizerBase, prompts: list[str], limit: int) -> list[dict[str, Any]]:
    cut, whole = (encode_prompts(tokenizer, prompts, most) for most in (limit, 2**31))
    chat = tokenizer.chat_template is not None
    said = [conversation(prompt) for prompt in prompts]
    return [
        {
            "text": prompt,
            "turns": list(turns) if chat else None,
            "tools": tools,
            "ids": ids,
            "is_plain": ids == all_ids and not has_control(tokenizer, prompt) and (chat or not is_dialogue(prompt)),
        }
        for prompt, (turns, tools), ids, all_ids in zip(prompts, said, cut, whole, strict=True)
    ]
