"""Training prompts that ask what a held-out prompt asks.

Compared are questions: the first turn of the user, the dialogue as a whole, and of training dialogues every later turn
of the user too, if it is long enough to mean something by itself. Instructions of a system turn are no evidence.
"""

from array import array
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np

from rlhf_core.data.cleaning.banding import Banding, Buckets, Members
from rlhf_core.data.cleaning.one_word import OneWord
from rlhf_core.text.identity import later_questions, opening, said
from rlhf_core.text.likeness import shared_runs


@lru_cache(maxsize=64)
def questions(prompt: str, *, later: bool) -> list[str]:
    """The texts by which a prompt is compared, each once; `later` adds the later turns of the user."""
    return list(dict.fromkeys([opening(prompt), said(prompt), *(later_questions(prompt) if later else ())]))


def leaking_prompts(
    train: Iterable[str], heldout: Iterable[str], threshold: float, *, one_word: bool = True
) -> set[str]:
    """The training prompts that ask nearly what a held-out prompt asks.

    Args:
        threshold: Jaccard similarity of two questions (`likeness`) at or above which they are nearly the same.
        one_word: questions that differ in a single word are nearly the same too (`one_word`).
    """
    held, own = _Questions(heldout, later=False), _Questions(train, later=True)
    if not len(held) or not len(own):
        return set()
    banding = Banding(threshold, [shared_runs(("", said(prompt)) for side in (held, own) for prompt in side.prompts)])
    keys = [banding.table(((text,) for text in side), len(side)) for side in (held, own)]
    members = Members(Buckets(np.concatenate(keys)))
    for number in range(len(held)):
        members.add(number)

    def leaks(number: int) -> bool:
        near = members.beside(len(held) + number)
        return any(banding.alike((own[number],), (held[other],)) for other in near)

    found = {own.prompt(number) for number in range(len(own)) if leaks(number)}
    if one_word:
        found |= {own.prompt(number) for number in OneWord(held).close(own)}
    return found


class _Questions(Sequence[str]):
    """The questions of some prompts, made anew each time, as prompts may be long and many."""

    def __init__(self, prompts: Iterable[str], *, later: bool) -> None:
        self.prompts = sorted(set(prompts))
        self._later = later
        self._owners, self._numbers = array("L"), array("L")
        for owner, prompt in enumerate(self.prompts):
            own = questions(prompt, later=later)
            self._owners.extend([owner] * len(own))
            self._numbers.extend(range(len(own)))

    def __len__(self) -> int:
        return len(self._owners)

    def __getitem__(self, number: int) -> str:  # type: ignore[override]
        return questions(self.prompt(number), later=self._later)[self._numbers[number]]

    def prompt(self, number: int) -> str:
        """The prompt that a question is from."""
        return self.prompts[self._owners[number]]
