"""Candidates for near duplicates: items that share a band of their MinHash signatures (Broder 1997).

An item is a sequence of texts, one a place. If every text of two items reaches a similarity, so does the union of all
their runs, each marked with its place; so signatures are of unions. What is shared (`likeness.shared_runs`) is left out
of them, and numbers and signs are part of every key, so that a template alone makes no candidates.

Suffixes: P = permutations, R = runs, N = items, B = bands.
"""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import repeat

import numpy as np

from rlhf_core.text.likeness import shingles, similarity

NUM_PERMUTATIONS = 128
MISS_PROBABILITY = 1e-4
_random = np.random.Generator(np.random.PCG64(1))
_FACTOR_P1 = _random.integers(2**63, size=(NUM_PERMUTATIONS, 1), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_SUMMAND_P1 = _random.integers(2**63, size=(NUM_PERMUTATIONS, 1), dtype=np.uint64)
_MIX_P = _random.integers(2**63, size=NUM_PERMUTATIONS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_HALF = np.uint64(32)


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


def alike(
    one: Sequence[str], other: Sequence[str], threshold: float, shared: Sequence[frozenset[str]] | None = None
) -> bool:
    """Whether every text of one item reaches the similarity with the other's at the same place."""
    templates = shared or [frozenset()] * len(one)
    return all(
        similarity(shingles(text), shingles(twin), template) >= threshold
        for text, twin, template in zip(one, other, templates, strict=True)
    )


class Banding:
    """Keys of items, one a band; two items that are alike share at least one, but for a chance of 1e-4."""

    def __init__(self, threshold: float, shared: Sequence[frozenset[str]]) -> None:
        """Settle the bands.

        Args:
            threshold: Jaccard similarity that each text of two items must reach, above 0.
            shared: runs that are no evidence, by place.
        """
        self.threshold, self.shared = threshold, shared
        self.num_bands, self._rows = bands(threshold)
        self._part = lru_cache(maxsize=512)(self._part_signature)  # the keys are whole texts, which may be long

    def keys(self, texts: Sequence[str]) -> np.ndarray:
        """The keys of an item, [B], 32 bits each."""
        values_P = np.minimum.reduce([self._part(place, text) for place, text in enumerate(texts)])
        used = self.num_bands * self._rows
        mixed_BR = (values_P[:used] * _MIX_P[:used]).reshape(self.num_bands, self._rows)
        marks = zlib.crc32(repr([shingles(text).marks for text in texts]).encode())
        keys_B = mixed_BR.sum(1, dtype=np.uint64) + np.array([marks], np.uint64) * _MIX_P[-1:]
        return (keys_B >> _HALF).astype(np.uint32)

    def table(self, items: Iterable[Sequence[str]], number: int) -> np.ndarray:
        """The keys of that many items, [N, B]."""
        keys_NB = np.empty((number, self.num_bands), np.uint32)
        for place, texts in enumerate(items):
            keys_NB[place] = self.keys(texts)
        return keys_NB

    def alike(self, one: Sequence[str], other: Sequence[str]) -> bool:
        """Whether two items are alike in every text."""
        return alike(one, other, self.threshold, self.shared)

    def _part_signature(self, place: int, text: str) -> np.ndarray:
        cut = shingles(text)
        # A text of shared runs alone is like itself only, and has a run that says so.
        told = (cut.runs - self.shared[place]) or {" ".join(sorted(cut.runs))}
        start = zlib.crc32(f"{place} ".encode())  # a CRC goes on from there as if the two were one text
        crcs = map(zlib.crc32, map(str.encode, told), repeat(start))
        hashes_R = np.fromiter(crcs, np.uint64, len(told))
        # Multiply, add, shift (Dietzfelbinger 1996): a random function of 32 bits for each permutation.
        return np.minimum.reduce((_FACTOR_P1 * hashes_R + _SUMMAND_P1) >> _HALF, axis=1)


class Buckets:
    """Items by the keys that they share with others."""

    def __init__(self, keys_NB: np.ndarray) -> None:
        """Number the keys that several items have; the table is used up."""
        self._numbers_NB = keys_NB.view(np.int32)
        start = 0
        for band in range(keys_NB.shape[1]):
            _, number_N, count = np.unique(keys_NB[:, band], return_inverse=True, return_counts=True)
            several = count > 1
            renamed = np.where(several, start + np.cumsum(several) - 1, -1)
            self._numbers_NB[:, band] = renamed[number_N]
            start += int(several.sum())

    def of(self, item: int) -> list[int]:
        """The buckets in which an item is not alone."""
        numbers_B = self._numbers_NB[item]
        found: list[int] = numbers_B[numbers_B >= 0].tolist()
        return found


class Members:
    """Items that were put into buckets, in order."""

    def __init__(self, buckets: Buckets) -> None:
        self._buckets = buckets
        self._members: dict[int, list[int]] = {}

    def add(self, item: int) -> None:
        """Put an item into its buckets."""
        for bucket in self._buckets.of(item):
            self._members.setdefault(bucket, []).append(item)

    def beside(self, item: int) -> Iterator[int]:
        """Each item that was put into a bucket of this one, once."""
        seen = set()
        for bucket in self._buckets.of(item):
            for other in self._members.get(bucket, ()):
                if other not in seen:
                    seen.add(other)
                    yield other
