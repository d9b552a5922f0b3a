"""Rows of data files as the tokens that stages make of them: which are learned, which are only read, and what is cut.

Every token comes from the functions that the stages encode with; nothing is written a second time here. A file needs
nothing but a tokenizer, so it can be looked at before anything is trained.
"""

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from rlhf_core.data.batching.examples import encode_dialogues
from rlhf_core.data.batching.pairs import encode_pairs
from rlhf_core.data.reading.judgements import responses_of
from rlhf_core.data.reading.kinds import Kind
from rlhf_core.errors import DataError
from rlhf_core.text.encoded import TextCounts
from rlhf_core.text.tokenizer import encode_prompts, encode_whole_responses
from rlhf_core.text.transcripts import replies_of

Values = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskLimits:
    """What decides, beside the tokenizer, which tokens of a row are learned: see `model` and `sft` in `params.yaml`."""

    max_prompt_tokens: int
    max_response_tokens: int
    turns: Literal["all", "last"] = "all"


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedTokens:
    """Tokens that go through a model in one row.

    Attributes:
        name: what of the data they are, `chosen` say.
        ids: the tokens.
        mask: 1 for each that counts in the loss, 0 for those that are only read.
    """

    name: str
    ids: list[int]
    mask: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class RowTokens:
    """A row of a file as tokens.

    Attributes:
        sequences: what goes through a model; where a stage leaves the row out, what can be shown of it, unlearned.
        cut_from_prompt: tokens that its prompt lost at the beginning; of several prompts, the most that one lost.
        cut_from_responses: tokens that its responses lost at their ends.
        cut_ends: the text of each of these ends.
        counts: what else became of its texts.
        refused: why no stage can make tokens of it; empty where that is possible.
    """

    sequences: list[MaskedTokens] = field(default_factory=list)
    cut_from_prompt: int = 0
    cut_from_responses: int = 0
    cut_ends: list[str] = field(default_factory=list)
    counts: TextCounts = field(default_factory=TextCounts)
    refused: str = ""

    @property
    def learned(self) -> int:
        """Tokens that count in the loss."""
        return sum(sum(sequence.mask) for sequence in self.sequences)

    @property
    def read(self) -> int:
        """Tokens that go through a model without counting in the loss."""
        return sum(len(sequence.ids) for sequence in self.sequences) - self.learned


@dataclass(kw_only=True, slots=True)
class MaskTotals:
    """Tokens of all rows that were added.

    Attributes:
        rows: all of them.
        refused: rows of which no stage can make tokens, by the reason.
        without_targets: rows of which nothing is learned, the refused ones among them.
        learned, read, cut_from_prompts, cut_from_responses: see `RowTokens`.
        counts: what became of the texts.
    """

    rows: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    without_targets: int = 0
    learned: int = 0
    read: int = 0
    cut_from_prompts: int = 0
    cut_from_responses: int = 0
    counts: TextCounts = field(default_factory=TextCounts)

    def add(self, row: RowTokens) -> None:
        """Count a row."""
        self.rows += 1
        self.refused.update([row.refused] if row.refused else [])
        self.without_targets += not row.learned
        self.learned += row.learned
        self.read += row.read
        self.cut_from_prompts += row.cut_from_prompt
        self.cut_from_responses += row.cut_from_responses
        self.counts += row.counts


def row_tokens(tokenizer: PreTrainedTokenizerBase, kind: Kind, values: Values, limits: MaskLimits) -> RowTokens:
    """Encode one good row as the stages do that learn from rows of its kind.

    Demonstrations are `sft`'s; comparisons, votes and rankings become pairs, whose responses `reward` and the
    alignment stages learn from; grades too, where there are several of a prompt. Prompts teach nothing by themselves.
    """
    counts = TextCounts()
    try:
        sequences = _ENCODERS[kind](tokenizer, values, limits, counts)
        if not sequences:
            sequences = _unlearned(tokenizer, kind, values, limits)
        prompt, ends = _cut(tokenizer, kind, values, limits) if counts.prompts_cut or counts.responses_cut else (0, [])
    except DataError as error:
        return RowTokens(refused=str(error), counts=counts)
    return RowTokens(
        sequences=sequences,
        cut_from_prompt=prompt,
        cut_from_responses=sum(map(len, ends)),
        cut_ends=[tokenizer.decode(end) for end in ends],
        counts=counts,
    )


def _turns(kind: Kind, values: Values, limits: MaskLimits) -> list[tuple[str, str]]:
    """Every prompt of a row with what is to be written after it."""
    if kind == "demonstrations":
        whole = (values["prompt"], values["response"])
        return replies_of(*whole) if limits.turns == "all" else [whole]
    return [(values["prompt"], response) for response in responses_of(kind, values)]


def _demonstration(
    tokenizer: PreTrainedTokenizerBase, values: Values, limits: MaskLimits, counts: TextCounts
) -> list[MaskedTokens]:
    (examples,) = encode_dialogues(
        tokenizer,
        [_turns("demonstrations", values, limits)],
        [""],
        max_prompt_tokens=limits.max_prompt_tokens,
        max_response_tokens=limits.max_response_tokens,
        counts=counts,
    )
    return [
        _masked("demonstration", example.prompt, example.response, example.mask or [1] * len(example.response))
        for example in examples
    ]


def _pair(first: str, second: str) -> Callable[..., list[MaskedTokens]]:
    """Encodes a pair whose responses stand in two fields."""

    def encode(
        tokenizer: PreTrainedTokenizerBase, values: Values, limits: MaskLimits, counts: TextCounts
    ) -> list[MaskedTokens]:
        pairs = encode_pairs(
            tokenizer,
            [{"prompt": values["prompt"], "chosen": values[first], "rejected": values[second]}],
            max_prompt_tokens=limits.max_prompt_tokens,
            max_response_tokens=limits.max_response_tokens,
            counts=counts,
        )
        named = [
            (name, pair.prompt, ids) for pair in pairs for name, ids in ((first, pair.chosen), (second, pair.rejected))
        ]
        return [_masked(name, prompt, response, [1] * len(response)) for name, prompt, response in named]

    return encode


def _responses(kind: Kind) -> Callable[..., list[MaskedTokens]]:
    """Encodes any number of responses to one prompt; without any, the prompt alone."""

    def encode(
        tokenizer: PreTrainedTokenizerBase, values: Values, limits: MaskLimits, counts: TextCounts
    ) -> list[MaskedTokens]:
        (prompt,) = encode_prompts(tokenizer, [values["prompt"]], limits.max_prompt_tokens, counts)
        texts = responses_of(kind, values)
        whole = encode_whole_responses(tokenizer, texts, limits.max_response_tokens, counts)
        names = [f"response {number}" for number in range(1, len(texts) + 1)] if len(texts) > 1 else ["response"]
        named = zip(names, whole, strict=False)
        found = [_masked(name, prompt, ids, [1] * len(ids)) for name, ids in named if ids is not None]
        return found or [_masked("prompt", prompt, [], [])]

    return encode


_ENCODERS: Mapping[Kind, Callable[..., list[MaskedTokens]]] = {
    "demonstrations": _demonstration,
    "comparisons": _pair("chosen", "rejected"),
    "votes": _pair("response_a", "response_b"),
    "rankings": _responses("rankings"),
    "graded": _responses("graded"),
    "prompts": _responses("prompts"),
    "heldout_prompts": _responses("heldout_prompts"),
}


def _unlearned(
    tokenizer: PreTrainedTokenizerBase, kind: Kind, values: Values, limits: MaskLimits
) -> list[MaskedTokens]:
    """The tokens of a row that a stage leaves out, nothing of them learned."""
    turns = _turns(kind, values, limits)
    prompts = encode_prompts(tokenizer, [prompt for prompt, _ in turns], limits.max_prompt_tokens)
    responses = encode_whole_responses(tokenizer, [text for _, text in turns], limits.max_response_tokens)
    both = zip(prompts, responses, strict=True)
    return [_masked("left out", prompt, ids or [], [0] * len(ids or [])) for prompt, ids in both]


def _masked(name: str, prompt: list[int], response: list[int], mask: list[int]) -> MaskedTokens:
    return MaskedTokens(name=name, ids=[*prompt, *response], mask=[0] * len(prompt) + mask)


def _cut(
    tokenizer: PreTrainedTokenizerBase, kind: Kind, values: Values, limits: MaskLimits
) -> tuple[int, list[list[int]]]:
    """How many tokens a prompt of the row loses, and those that its responses lose: beside what has no limit."""
    turns = _turns(kind, values, limits)
    prompts = [prompt for prompt, _ in turns] or [values["prompt"]]
    kept, whole = (encode_prompts(tokenizer, prompts, most) for most in (limits.max_prompt_tokens, sys.maxsize))
    lost = [len(all_of) - len(some) for some, all_of in zip(kept, whole, strict=True)]
    replies = encode_whole_responses(tokenizer, [text for _, text in turns], sys.maxsize)
    ends = [ids[limits.max_response_tokens :] for ids in replies if ids is not None]
    return max(lost), [end for end in ends if end]
