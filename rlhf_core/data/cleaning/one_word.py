"""Questions that differ in a single word: too few of their runs are the same for a similarity to tell.

A word may be put in, taken out or exchanged; of a script without spaces, up to two characters. Numbers and signs must
be the same, and so must a letter that stands alone (x is not y, aisle A is not aisle B). A question must have at least
four words, and what is left without the word must not be a template: the frame of twenty questions or more.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from rlhf_core.text.likeness import cut, marks, num_words

LEAST_WORDS = 4
MOST_TOKENS = 128
"""One word in a longer question leaves 95 % of its runs as they were."""
TEMPLATE = 20
AT_ONCE = 4096
_MODULUS = (1 << 61) - 1
_BASE = 0x1F3D5B79A2C4E687 % _MODULUS


class OneWord:
    """Questions, found again by what is left of them without a word."""

    def __init__(self, questions: Sequence[str]) -> None:
        """Take in the questions, in normal form, among which to look."""
        self._questions = questions
        frames, owners = _frames(questions)
        order = np.argsort(frames, kind="stable")
        self._frames, self._owners = frames[order], owners[order]

    def close(self, others: Sequence[str]) -> set[int]:
        """Places of the other questions that are one of these but for a word."""
        frames, owners = self._known_frames(others)
        several, count = np.unique(np.concatenate([frames, self._frames]), return_counts=True)
        found: set[int] = set()
        for frame, owner in zip(frames.tolist(), owners.tolist(), strict=True):
            if owner not in found and count[np.searchsorted(several, np.uint64(frame))] < TEMPLATE:
                first, last = np.searchsorted(self._frames, np.array([frame, frame + 1], np.uint64))
                text = others[owner]
                if any(one_word_apart(text, self._questions[held]) for held in self._owners[first:last]):
                    found.add(owner)
        return found

    def _known_frames(self, others: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The frames of other questions that one of these has too; made of some thousand questions at a time."""
        frames, owners = [self._frames[:0]], [self._owners[:0]]
        for start in range(0, len(others), AT_ONCE):
            some, places = _frames([others[place] for place in range(start, min(start + AT_ONCE, len(others)))])
            known = np.isin(some, self._frames)
            frames.append(some[known])
            owners.append(places[known] + np.uint64(start))
        return np.concatenate(frames), np.concatenate(owners)


def one_word_apart(one: str, other: str) -> bool:
    """Whether two texts in normal form are the same but for one word."""
    if marks(one) != marks(other):
        return False
    first, second = cut(one)[0], cut(other)[0]
    start = _common(first, second)
    end = _common(first[start:][::-1], second[start:][::-1])
    parts = [_part(text, start, end) for text in (one, other)]
    letters = [len(tokens) == 1 and len(tokens[0]) == 1 and kinds == ("word",) for tokens, kinds in parts]
    return all(_is_word(kinds) for _, kinds in parts) and not all(letters)


def _part(text: str, start: int, end: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    tokens, kinds = cut(text)
    return tokens[start : len(tokens) - end], kinds[start : len(kinds) - end]


def _is_word(kinds: tuple[str, ...]) -> bool:
    return len(kinds) <= 1 or kinds == ("character", "character")


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """How many tokens at the start are the same."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (mine, yours) in pairs if mine != yours), min(len(one), len(other)))


def _frames(questions: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Every frame of every question as a number, and the place of its question."""
    frames, owners = array("Q"), array("L")
    for place, question in enumerate(questions):
        own = set(_frames_of(question))
        frames.extend(own)
        owners.extend([place] * len(own))
    return np.frombuffer(frames, np.uint64), np.frombuffer(owners, np.uint64)


def _frames_of(question: str) -> Iterator[int]:
    """What is left of a question without one word, at each place, as a number below 2^61."""
    tokens, kinds = cut(question)
    if num_words(question) < LEAST_WORDS or len(tokens) > MOST_TOKENS:
        return
    before, after = _prefixes(tokens), _prefixes(tokens[::-1])[::-1]
    for start in range(len(tokens) + 1):
        for end in range(start, min(start + 2, len(tokens)) + 1):
            if _is_word(kinds[start:end]):
                yield (before[start] * 3 + after[end] * _BASE) % _MODULUS


def _prefixes(tokens: Sequence[str]) -> list[int]:
    """A number for the tokens before each place, and for all of them."""
    numbers = [1]
    for token in tokens:
        numbers.append((numbers[-1] * _BASE + int.from_bytes(token.encode()) + 1) % _MODULUS)
    return numbers
