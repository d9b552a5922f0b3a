"""Preference pairs as tokens, gathered by prompt: what the reward model and DPO learn from.

Shape suffixes: B = responses of a batch, N = pairs of a batch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_core.data.reading.rankings import rankings_of
from rlhf_core.engine.batches import SequenceBatch, collate, length_buckets
from rlhf_core.text.encoded import TextCounts
from rlhf_core.text.tokenizer import encode_prompts, encode_whole_responses


@dataclass(frozen=True, kw_only=True, slots=True)
class PairLabel:
    """What people said of a pair, beside which response they chose.

    Attributes:
        agreement: share of the votes that say the same as the label.
        margin: mean signed vote strength toward the label; 0 for a tie.
        criterion: what was judged.
        tie: neither response is better; which of the two stands as chosen means nothing.
        rankings: identities of the rankings that the pair comes from.
    """

    agreement: float = 1.0
    margin: float = 1.0
    criterion: str = "overall"
    tie: bool = False
    rankings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferencePair:
    """A prompt's tokens with those of the chosen and of the rejected response."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    label: PairLabel = PairLabel()


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferenceGroup:
    """All pairs of one prompt.

    Attributes:
        prompt: its tokens.
        responses: the distinct responses, tokens each.
        pairs: (chosen, rejected) as places in `responses`.
        labels: one a pair; pairs that came without any get the plain one.
    """

    prompt: list[int]
    responses: list[list[int]]
    pairs: list[tuple[int, int]]
    labels: list[PairLabel] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.labels.extend(PairLabel() for _ in self.pairs[len(self.labels) :])


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, Any]],
    *,
    max_prompt_tokens: int,
    max_response_tokens: int,
    counts: TextCounts | None = None,
) -> list[PreferencePair]:
    """Turn rows with `prompt`, `chosen` and `rejected` into tokens, in the order given.

    The columns `agreement`, `margin`, `criterion`, `tie` and `source`, where a row has them, become the pair's label.
    Pairs whose two responses are the same tokens once they are cut to `max_response_tokens` prefer nothing and are
    left out; so are pairs with a response that the chat template does not write whole. `counts` is told of both, and of
    all that was cut.
    """
    counts = TextCounts() if counts is None else counts
    rows = list(rows)
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in rows], max_prompt_tokens, counts)
    chosen = encode_whole_responses(tokenizer, [row["chosen"] for row in rows], max_response_tokens, counts)
    rejected = encode_whole_responses(tokenizer, [row["rejected"] for row in rows], max_response_tokens, counts)
    counts.pairs_encoded += len(rows)
    pairs = []
    for row, prompt, better, worse in zip(rows, prompts, chosen, rejected, strict=True):
        if better is None or worse is None:
            continue
        if better == worse:
            counts.pairs_equal_when_cut += 1
        else:
            pairs.append(PreferencePair(prompt=prompt, chosen=better, rejected=worse, label=_label(row)))
    return pairs


def _label(row: Mapping[str, Any]) -> PairLabel:
    given = {name: row[name] for name in ("agreement", "margin", "criterion", "tie") if name in row}
    return PairLabel(**given, rankings=rankings_of(row.get("source", "")))


def group_pairs(pairs: Sequence[PreferencePair]) -> list[PreferenceGroup]:
    """Gather pairs by prompt, in order of first appearance.

    A response that stands in several pairs then goes through a model once a step and not once a pair, and the pairs
    of one prompt, which are not independent, count in one step and not in several (Ouyang et al. 2022, section 3.5).
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
        group.labels.append(pair.label)
    return list(groups.values())


def group_batches(
    groups: Sequence[PreferenceGroup], groups_per_batch: int, generator: torch.Generator
) -> list[list[int]]:
    """Indexes of the groups of each batch: shuffled, similar lengths together, every group once."""
    lengths = [len(group.prompt) + max(map(len, group.responses)) for group in groups]
    return length_buckets(lengths, groups_per_batch, generator)


def collate_groups(groups: Sequence[PreferenceGroup], pad_id: int) -> tuple[SequenceBatch, Tensor, Tensor]:
    """Every response of the groups once, and the rows that are chosen and rejected in each pair, [N] each."""
    starts = accumulate((len(group.responses) for group in groups), initial=0)
    pairs_N2 = torch.tensor(
        [
            (start + chosen, start + rejected)
            for start, group in zip(starts, groups, strict=False)
            for chosen, rejected in group.pairs
        ]
    )
    return collate_responses(groups, pad_id), pairs_N2[:, 0], pairs_N2[:, 1]


def collate_responses(groups: Sequence[PreferenceGroup], pad_id: int) -> SequenceBatch:
    """Every response of the groups once, group by group."""
    prompts = [group.prompt for group in groups for _ in group.responses]
    return collate(prompts, [response for group in groups for response in group.responses], pad_id)
