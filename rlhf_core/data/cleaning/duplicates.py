"""Pairs that say the same as others, or nearly: exact and near duplicates, and near ones with the opposite label.

Two pairs are near duplicates when their instructions, what was said, and both responses are alike (`likeness`).
"""

from collections.abc import Iterable, Sequence

import numpy as np

from rlhf_core.data.cleaning.banding import Banding, Buckets, Members
from rlhf_core.data.cleaning.labelled import Content, Preference
from rlhf_core.data.reading.rankings import is_ranked
from rlhf_core.text.identity import instructions, said, seen_reply
from rlhf_core.text.likeness import shared_runs

Texts = tuple[str, str, str, str]


def without_exact(pairs: Iterable[Preference]) -> list[Preference]:
    """Keep the surest pair of those with the same prompt, chosen and rejected response in normal form."""
    kept: dict[Content, Preference] = {}
    for pair in sorted(pairs, key=lambda pair: pair.strength_first):
        kept.setdefault(pair.content, pair)
    return list(kept.values())


def without_near(pairs: Iterable[Preference], threshold: float) -> list[Preference]:
    """Keep pairs, the surest first, that are no near duplicate of one kept before.

    Pairs that rankings of one prompt gave are none of each other: which of two responses that differ little is better
    is what they say.
    """
    ordered = sorted(pairs, key=lambda pair: pair.strength_first)
    banding = _banding(ordered, threshold)
    members = Members(Buckets(_keys(banding, ordered)))
    kept = []
    for number, pair in enumerate(ordered):
        if not any(_same(banding, pair, ordered[other]) for other in members.beside(number)):
            members.add(number)
            kept.append(pair)
    return kept


def without_near_contradictions(pairs: Iterable[Preference], threshold: float) -> list[Preference]:
    """Where near duplicates have opposite labels keep those whose side has more summed strength; none if they are even.

    The strength of a pair is its margin times its votes; its side are its near duplicates with the same label. Which of
    two responses that are alike themselves is chosen contradicts nothing.
    """
    ordered = sorted(pairs, key=lambda pair: pair.strength_first)
    number = len(ordered)
    banding = _banding(ordered, threshold)
    members = Members(Buckets(_keys(banding, ordered, turned_too=True)))
    for place in range(number):
        members.add(place)

    def stands(place: int) -> bool:
        pair = ordered[place]
        near = (ordered[other] for other in members.beside(number + place))
        against = [other for other in near if _opposite(banding, pair, other)]
        if not against:
            return True
        beside = (ordered[other] for other in members.beside(place) if other != place)
        behind = [pair, *(other for other in beside if _same(banding, pair, other))]
        return _strength(behind) > _strength(against)

    return [pair for place, pair in enumerate(ordered) if stands(place)]


def _banding(pairs: Sequence[Preference], threshold: float) -> Banding:
    of_prompts = shared_runs(("", f"{instructions(pair.prompt)} {said(pair.prompt)}") for pair in pairs)
    # A refusal that answers many prompts is shared, though it is one text.
    of_responses = shared_runs((pair.group, text) for pair in pairs for text in (pair.chosen, pair.rejected))
    return Banding(threshold, [of_prompts, of_prompts, of_responses, of_responses])


def _keys(banding: Banding, pairs: Sequence[Preference], *, turned_too: bool = False) -> np.ndarray:
    """The keys of all pairs, and of all with responses exchanged; made prompt by prompt, where texts come again."""
    sides = (False, True) if turned_too else (False,)
    keys_NB = np.empty((len(sides) * len(pairs), banding.num_bands), np.uint32)
    for place in sorted(range(len(pairs)), key=lambda place: pairs[place].group):
        for side, turned in enumerate(sides):
            keys_NB[side * len(pairs) + place] = banding.keys(_texts(pairs[place], turned=turned))
    return keys_NB


def _texts(pair: Preference, *, turned: bool = False) -> Texts:
    chosen, rejected = (pair.rejected, pair.chosen) if turned else (pair.chosen, pair.rejected)
    return instructions(pair.prompt), said(pair.prompt), seen_reply(chosen), seen_reply(rejected)


def _same(banding: Banding, one: Preference, other: Preference) -> bool:
    return not _ranked_together(one, other) and banding.alike(_texts(one), _texts(other))


def _opposite(banding: Banding, one: Preference, other: Preference) -> bool:
    return (
        not _ranked_together(one, other)
        and banding.alike(_texts(one, turned=True), _texts(other))
        and not banding.alike(_texts(one), _texts(other))
    )


def _ranked_together(one: Preference, other: Preference) -> bool:
    return is_ranked(one.source) and is_ranked(other.source) and one.group == other.group


def _strength(pairs: Iterable[Preference]) -> float:
    """Summed strength; sorted, as a sum of floats depends on the order of its terms."""
    return sum(sorted(pair.margin * pair.num_votes for pair in pairs))
