"""Exact and near duplicates: MinHash with banding proposes, exact Jaccard similarity of word shingles decides.

Two texts are near duplicates when the Jaccard similarity of their shingles (runs of three words, in normal form)
reaches a threshold and they hold the same numbers: a price of 15 is not a price of 45, however alike the rest is.
"""

import re
import zlib
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from datasketch import MinHash, MinHashLSH

from rlhf_core.data.labelled import Preference
from rlhf_core.data.normal import normal_form
from rlhf_core.data.rankings import is_ranked

Key = TypeVar("Key", bound=Hashable)

SHINGLE_WORDS = 3
NUM_PERMUTATIONS = 128
MISS_PROBABILITY = 1e-4
_SEED = 1
_WORD = re.compile(r"\w+")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


@dataclass(frozen=True, slots=True)
class Shingles:
    """What near duplicates are judged by: the set of word runs, and the numbers in sorted order."""

    runs: frozenset[str]
    numbers: tuple[str, ...]


def shingles(text: str) -> Shingles:
    """Cut a text into runs of three words; a shorter one is a single run, one without words its normal form."""
    plain = normal_form(text)
    words = _WORD.findall(plain) or [plain]
    last = max(1, len(words) - SHINGLE_WORDS + 1)
    runs = frozenset(" ".join(words[start : start + SHINGLE_WORDS]) for start in range(last))
    return Shingles(runs, tuple(sorted(_NUMBER.findall(plain))))


def similarity(first: Shingles, second: Shingles) -> float:
    """Jaccard similarity of the runs, or 0 where the numbers differ."""
    if first.numbers != second.numbers:
        return 0.0
    return len(first.runs & second.runs) / len(first.runs | second.runs)


def bands(threshold: float) -> tuple[int, int]:
    """Bands and rows of the banding: as many rows as keep the chance to miss a pair at the threshold below 1e-4.

    A pair of similarity s becomes a candidate with probability 1 - (1 - s^rows)^bands (Leskovec, Rajaraman and
    Ullman 2020, section 3.4).
    """
    for rows in range(NUM_PERMUTATIONS, 1, -1):
        count = NUM_PERMUTATIONS // rows
        if (1 - threshold**rows) ** count <= MISS_PROBABILITY:
            return count, rows
    return NUM_PERMUTATIONS, 1


class NearDuplicates(Generic[Key]):
    """An index of items, each a sequence of texts, that finds the items alike in every one of their texts.

    Args:
        threshold: Jaccard similarity that each text of two items must reach, above 0.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._lsh = MinHashLSH(num_perm=NUM_PERMUTATIONS, params=bands(threshold))
        self._blank = MinHash(num_perm=NUM_PERMUTATIONS, seed=_SEED, scheme="affine32")
        self._items: dict[Key, Sequence[Shingles]] = {}
        self._signatures: dict[tuple[int, str], np.ndarray] = {}
        self._shingles: dict[str, Shingles] = {}

    def add(self, key: Key, texts: Sequence[str]) -> None:
        """Put an item into the index; its key must be new."""
        self._items[key] = [self._cut(text) for text in texts]
        self._lsh.insert(key, self._signature(texts))

    def find(self, texts: Sequence[str]) -> list[Key]:
        """Keys of the items whose texts are near duplicates of these, one by one; in no stated order."""
        parts = [self._cut(text) for text in texts]
        return [key for key in self._lsh.query(self._signature(texts)) if self._alike(parts, self._items[key])]

    def _alike(self, parts: Sequence[Shingles], others: Sequence[Shingles]) -> bool:
        return all(similarity(part, other) >= self._threshold for part, other in zip(parts, others, strict=True))

    def _cut(self, text: str) -> Shingles:
        if text not in self._shingles:
            self._shingles[text] = shingles(text)
        return self._shingles[text]

    def _signature(self, texts: Sequence[str]) -> MinHash:
        """The signature of the union of all texts' runs, each marked with its text's place.

        If every text reaches the threshold, so does the union, so no near duplicate is lost by asking for it.
        """
        values = np.minimum.reduce([self._part_signature(place, text) for place, text in enumerate(texts)])
        signature = self._blank.copy()
        signature.hashvalues = values
        return signature

    def _part_signature(self, place: int, text: str) -> np.ndarray:
        if (place, text) not in self._signatures:
            signature = MinHash(
                num_perm=NUM_PERMUTATIONS,
                hashfunc=zlib.crc32,
                seed=_SEED,
                scheme=self._blank.scheme,
                permutations=self._blank.permutations,
            )
            signature.update_batch(f"{place} {run}".encode() for run in self._cut(text).runs)
            self._signatures[place, text] = signature.hashvalues
        return self._signatures[place, text]


def without_exact(pairs: Iterable[Preference]) -> list[Preference]:
    """Keep the surest pair of those with the same prompt group, chosen and rejected response in normal form."""
    kept: dict[tuple[str, str, str], Preference] = {}
    for pair in sorted(pairs, key=lambda pair: pair.strength_first):
        kept.setdefault(pair.content, pair)
    return list(kept.values())


def without_near(pairs: Iterable[Preference], threshold: float) -> list[Preference]:
    """Keep pairs, the surest first, that are no near duplicate of one kept before.

    Two pairs are near duplicates when their prompts, their chosen and their rejected responses are. Pairs that rankings
    of one prompt gave are none of each other: which of two responses that differ little is better is what they say.
    """
    index: NearDuplicates[int] = NearDuplicates(threshold)
    kept: list[Preference] = []
    for pair in sorted(pairs, key=lambda pair: pair.strength_first):
        texts = (pair.prompt, pair.chosen, pair.rejected)
        if all(_ranked_together(pair, kept[place]) for place in index.find(texts)):
            index.add(len(kept), texts)
            kept.append(pair)
    return kept


def _ranked_together(one: Preference, other: Preference) -> bool:
    return is_ranked(one.source) and is_ranked(other.source) and one.group == other.group


def leaking_prompts(train: Iterable[str], heldout: Iterable[str], threshold: float) -> set[str]:
    """The training prompts that are near duplicates of a held-out prompt."""
    index: NearDuplicates[int] = NearDuplicates(threshold)
    for key, prompt in enumerate(sorted(set(heldout))):
        index.add(key, (prompt,))
    return {prompt for prompt in set(train) if index.find((prompt,))}
