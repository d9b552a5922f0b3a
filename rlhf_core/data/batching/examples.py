"""Demonstrations as tokens: which of them supervised fine-tuning learns to write."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice

from transformers import PreTrainedTokenizerBase

from rlhf_core.text.encoded import TextCounts
from rlhf_core.text.tokenizer import encode_prompts, encode_whole_responses

Turns = list[tuple[str, str]]
"""(prompt, reply) of the assistant's turns in one dialogue."""


@dataclass(frozen=True, slots=True)
class Example:
    """A row of supervised fine-tuning.

    Attributes:
        prompt: tokens that are only read.
        response: tokens after them; of a dialogue the assistant's replies with what the others say in between.
        mask: 1 for each response token that counts in the loss, 0 for the others; null where all count.
        task: type of the task, for batches balanced by it.
    """

    prompt: list[int]
    response: list[int]
    mask: list[int] | None = None
    task: str = ""

    @property
    def num_targets(self) -> int:
        """Tokens that count in the loss."""
        return len(self.response) if self.mask is None else sum(self.mask)

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model."""
        return len(self.prompt) + len(self.response)


def encode_dialogues(
    tokenizer: PreTrainedTokenizerBase,
    dialogues: Sequence[Turns],
    tasks: Sequence[str],
    *,
    max_prompt_tokens: int,
    max_response_tokens: int,
    counts: TextCounts | None = None,
) -> list[list[Example]]:
    """The learned turns of each demonstration as tokens, joined to one row where they go on from each other.

    Replies that the chat template does not write whole are left out. `counts` is told of them, and of all that was cut.

    Args:
        tasks: type of the task of each demonstration.
    """
    flat = list(chain(*dialogues))
    prompts = encode_prompts(tokenizer, [prompt for prompt, _ in flat], max_prompt_tokens, counts)
    replies = encode_whole_responses(tokenizer, [reply for _, reply in flat], max_response_tokens, counts)
    encoded = zip(prompts, replies, strict=True)
    examples = []
    for own, task in zip(dialogues, tasks, strict=True):
        whole = [(prompt, reply) for prompt, reply in islice(encoded, len(own)) if reply is not None]
        examples.append(join_turns(whole, task))
    if counts is not None:
        counts.demonstrations_encoded += len(examples)
        counts.demonstrations_without_targets += sum(not rows for rows in examples)
    return examples


def join_turns(turns: Sequence[tuple[list[int], list[int]]], task: str = "") -> list[Example]:
    """One row for successive (prompt, reply) of a dialogue wherever a prompt goes on exactly from the turn before.

    Every reply token of a joined row stands after the same tokens as in a row of its own, so it has the same
    log-probability, and no token is computed twice. A prompt that does not go on from the turn before (it lost its
    beginning, or the chat template writes earlier replies differently) begins a new row.
    """
    rows: list[Example] = []
    prompt: list[int] = []
    response: list[int] = []
    mask: list[int] = []

    def finish() -> None:
        if response:
            rows.append(Example(prompt, response, None if all(mask) else mask, task))

    for given, reply in turns:
        so_far = prompt + response
        if response and given[: len(so_far)] == so_far:
            between = given[len(so_far) :]
            response, mask = response + between + reply, mask + [0] * len(between) + [1] * len(reply)
        else:
            finish()
            prompt, response, mask = given, reply, [1] * len(reply)
    finish()
    return rows
