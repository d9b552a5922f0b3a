"""Preference pairs as tokens, one by one (DPO) or gathered by prompt (reward model)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_core.models.tokenizer import encode_prompts, encode_responses


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferencePair:
    """A prompt's tokens with those of the chosen and of the rejected response."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferenceGroup:
    """All pairs of one prompt.

    Attributes:
        prompt: its tokens.
        responses: the distinct responses, tokens each.
        pairs: (chosen, rejected) as places in `responses`.
    """

    prompt: list[int]
    responses: list[list[int]]
    pairs: list[tuple[int, int]]


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, Any]],
    *,
    max_prompt_tokens: int,
    max_response_tokens: int,
) -> list[PreferencePair]:
    """Turn rows with `prompt`, `chosen` and `rejected` into tokens, in the order given.

    Pairs whose two responses are the same tokens once they are cut to `max_response_tokens` prefer nothing and are
    left out.
    """
    rows = list(rows)
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in rows], max_prompt_tokens)
    chosen = encode_responses(tokenizer, [row["chosen"] for row in rows], max_response_tokens)
    rejected = encode_responses(tokenizer, [row["rejected"] for row in rows], max_response_tokens)
    return [
        PreferencePair(prompt=prompt, chosen=better, rejected=worse)
        for prompt, better, worse in zip(prompts, chosen, rejected, strict=True)
        if better != worse
    ]


def group_pairs(pairs: Sequence[PreferencePair]) -> list[PreferenceGroup]:
    """Gather pairs by prompt, in order of first appearance.

    A response that stands in several pairs is then scored once a step and not once a pair, and the pairs of one
    prompt, which are not independent, count in one step and not in several (Ouyang et al. 2022, section 3.5).
    """
    groups: dict[tuple[int, ...], PreferenceGroup] = {}
    places: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}
    for pair in pairs:
        key = tuple(pair.prompt)
        group = groups.setdefault(key, PreferenceGroup(prompt=pair.prompt, responses=[], pairs=[]))
        known = places.setdefault(key, {})
        for response in (pair.chosen, pair.rejected):
            if tuple(response) not in known:
                known[tuple(response)] = len(known)
                group.responses.append(response)
        group.pairs.append((known[tuple(pair.chosen)], known[tuple(pair.rejected)]))
    return list(groups.values())
