"""How alike two texts are: Jaccard similarity of their runs of three tokens, if they hold the same numbers and signs.

Tokens are words with their combining marks, each character of a script that puts no spaces between words, and signs:
operators, currency, emoji. Ordinary punctuation is none. A price of 15 is not a price of 45, and a < b is not a > b,
however alike the rest is.
"""

import heapq
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import regex
from cachetools import LRUCache, cached

from rlhf_core.text.normal import normal_form

RUN_TOKENS = 3
SHARED_SHARE, SHARED_TEXTS = 0.05, 20
SAMPLE = 2000
"""Runs in so large a share of the texts, and in so many of them, are shared: they come from a template. Shares are
taken in a sample of the texts, drawn by a hash of each."""
MOST_CACHED = 100_000
"""Tokens, and runs, of texts that come again and again; not counted in texts, as a thousand long ones are gigabytes."""

_SPACELESS = (
    r"[[\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}\p{Javanese}\p{Tai_Tham}]"
    r"&&\p{L}]"
)
_WORD = rf"[[\p{{L}}\p{{M}}\p{{N}}\p{{Pc}}]--{_SPACELESS}][[\p{{L}}\p{{M}}\p{{N}}\p{{Pc}}\u200c\u200d]--{_SPACELESS}]*"
_DASH = r"[\p{Pd}\u2212]"
_HYPHEN = rf"(?<=[\p{{L}}\p{{M}}]){_DASH}(?=\p{{L}})|(?<=[\p{{L}}\p{{M}}]{{2}}){_DASH}(?=\p{{N}})"
_NOT = r"!(?==)|(?<![\p{L}\p{M}\p{N}])!(?=[\p{L}\p{N}(_])|(?<=\p{N})!"
_OPERATOR = rf"[[\p{{S}}*/%&@#\\†‡§¶‰‱\u200d\U000e0020-\U000e007f]--[`´¨¸˜]]|{_DASH}|{_NOT}"
_DASH_SIGN = regex.compile(_DASH)
_TOKEN = regex.compile(
    rf"(?:{_HYPHEN})|(?P<character>{_SPACELESS}\p{{M}}*)|(?P<word>{_WORD}(?:['’]{_WORD})*)|(?P<sign>{_OPERATOR})",
    regex.V1,
)
_MARK = regex.compile(
    rf"(?:{_HYPHEN})|(?P<number>\p{{Nd}}+(?:[.,]\p{{Nd}}+)*|[\p{{Nl}}\p{{No}}])|(?P<sign>{_OPERATOR})|"
    r"(?P<bracket>[(){}\[\]])",
    regex.V1,
)


_ASCII_HYPHEN = r"(?<=[A-Za-z])-(?=[A-Za-z])|(?<=[A-Za-z]{2})-(?=[0-9])"
_ASCII_SIGN = r"[$+<=>^|~*/%&@#\\-]|!(?==)|(?<![A-Za-z0-9])!(?=[A-Za-z0-9(_])|(?<=[0-9])!"
_ASCII_TOKEN = re.compile(rf"(?:{_ASCII_HYPHEN})|([A-Za-z0-9_]+(?:'[A-Za-z0-9_]+)*)|({_ASCII_SIGN})")
_ASCII_MARKED = re.compile(r"[0-9$+<=>^|~*/%&@#\\!-]")
_PLAIN_QUOTES = str.maketrans("’‘“”", "'   ")
"""A short way for the commonest texts: of ASCII, `_ASCII_TOKEN` makes what `_TOKEN` does, in a fifth of the time."""


@dataclass(frozen=True, slots=True)
class Shingles:
    """What likeness is judged by: the set of token runs, and the numbers and signs in the order of the text."""

    runs: frozenset[str]
    marks: tuple[str, ...]


@cached(LRUCache(MOST_CACHED, getsizeof=lambda found: len(found[0])))
def cut(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The tokens of a text in normal form, and what each is: word, character (of a script without spaces) or sign."""
    plain = text.translate(_PLAIN_QUOTES)
    if plain.isascii():
        pairs = [pair for pair in _ASCII_TOKEN.findall(plain) if pair != ("", "")]
        return tuple(word or sign for word, sign in pairs), tuple("word" if word else "sign" for word, _ in pairs)
    found = [(each[0], each.lastgroup) for each in _TOKEN.finditer(text.replace("’", "'")) if each.lastgroup]
    return tuple(token for token, _ in found), tuple(kind for _, kind in found if kind)


def tokens(text: str) -> tuple[str, ...]:
    """Words, characters of scripts without spaces, and signs of a text in normal form."""
    return cut(text)[0]


def num_words(text: str) -> float:
    """Words of a text in normal form; a character of a script without spaces is two thirds of one, a sign is none."""
    kinds = cut(text)[1]
    return kinds.count("word") + kinds.count("character") * 2 / 3


def marks(text: str) -> tuple[str, ...]:
    """Numbers and signs of a text in normal form, in order; brackets are signs where there is an operator."""
    if text.isascii() and not _ASCII_MARKED.search(text):
        return ()
    found = [(each.lastgroup, _DASH_SIGN.sub("-", each[0])) for each in _MARK.finditer(text) if each.lastgroup]
    operators = any(kind == "sign" for kind, _ in found)
    return tuple(mark for kind, mark in found if kind != "bracket" or operators)


@cached(LRUCache(MOST_CACHED, getsizeof=lambda found: len(found.runs)))
def shingles(text: str) -> Shingles:
    """Cut a text into runs of three tokens; a shorter one is a single run, one without tokens its normal form."""
    plain = normal_form(text)
    found = tokens(plain) or (plain,)
    starts = [found[start:] for start in range(min(RUN_TOKENS, len(found)))]
    runs = frozenset(map(" ".join, zip(*starts, strict=False)))
    return Shingles(runs, marks(plain))


def similarity(first: Shingles, second: Shingles, shared: frozenset[str] = frozenset()) -> float:
    """Jaccard similarity of the runs, 0 where numbers or signs differ, and 1 for the same runs and marks.

    Runs that both have count neither for nor against if they are `shared`: what a template says is no evidence.
    """
    if first.marks != second.marks:
        return 0.0
    if first.runs == second.runs:
        return 1.0
    both = first.runs & second.runs
    told = len(both - shared) if shared else len(both)
    return told / (len(first.runs | second.runs) - len(both) + told)


def shared_runs(texts: Iterable[tuple[str, str]]) -> frozenset[str]:
    """Runs that stand in at least 5 % of the texts, and in 20 of them: those of a template.

    Args:
        texts: (where it stands, text); the same text at the same place counts once.
    """
    sample: dict[int, str] = {}
    for where, text in texts:
        sample[zlib.crc32(f"{where} {text}".encode())] = text
        if len(sample) >= 2 * SAMPLE:
            sample = dict(heapq.nsmallest(SAMPLE, sample.items()))
    sample = dict(heapq.nsmallest(SAMPLE, sample.items()))
    least = max(SHARED_TEXTS, SHARED_SHARE * len(sample))
    often = _frequent((hash(run) for text in sample.values() for run in shingles(text).runs), least)
    if not often:
        return frozenset()
    counts = Counter(run for text in sample.values() for run in shingles(text).runs if hash(run) in often)
    return frozenset(run for run, count in counts.items() if count >= least)


def _frequent(numbers: Iterable[int], least: float) -> frozenset[int]:
    """The numbers that come at least so often; eight bytes each while they are counted."""
    values, counts = np.unique(np.frombuffer(array("q", numbers), np.int64), return_counts=True)
    return frozenset(values[counts >= least].tolist())
