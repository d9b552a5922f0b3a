"""Votes on pairs of responses, whoever voted: people, a judge model, a simulation."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from rlhf_core.data.reading.kinds import OVERALL

Choice = Literal["a", "b", "tie"]
AddressedRandom = Callable[[str], random.Random]
"""A fresh generator for each purpose, so that no choice depends on how many were made before it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two different responses to one prompt, in the order in which they are shown, to be judged on one criterion."""

    pair_id: str
    prompt_id: str
    prompt: str
    task: str
    split: str  # "train" or "heldout"
    response_a: str
    response_b: str
    criterion: str = OVERALL


@dataclass(frozen=True, kw_only=True, slots=True)
class Vote:
    """One annotator's answer to one pair.

    `strength` says how much better the choice is (1 slightly to 5 by far) and means nothing for a tie.
    """

    annotator: str
    choice: Choice
    strength: int = 1
    seconds: float | None = None

    @classmethod
    def from_signed(cls, annotator: str, signed: int, *, seconds: float | None = None) -> Self:
        """A vote from one number: positive prefers a, negative b, 0 is a tie."""
        choice: Choice = "tie" if signed == 0 else "a" if signed > 0 else "b"
        return cls(annotator=annotator, choice=choice, strength=max(1, abs(signed)), seconds=seconds)

    @property
    def signed(self) -> int:
        """The strength with the sign of the choice: positive for a, negative for b, 0 for a tie."""
        return {"a": self.strength, "b": -self.strength, "tie": 0}[self.choice]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ballot:
    """A pair with all its votes.

    Attributes:
        rankings: identities of the rankings that some of the votes come from.
        shown: people saw the responses in the order of the pair; else which one stands first means nothing.
    """

    pair: Pair
    votes: tuple[Vote, ...]
    rankings: tuple[str, ...] = ()
    shown: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Majority:
    """What the votes on a pair add up to."""

    label: Choice
    agreement: float  # share of all votes that say the same as the label
    margin: float  # mean signed strength toward the label, never negative; 0 for a tie


def mean_or_none(values: Sequence[float]) -> float | None:
    """Arithmetic mean, None of nothing."""
    return sum(values) / len(values) if values else None
