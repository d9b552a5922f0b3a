"""Votes on pairs of responses and what they add up to, whoever voted: people, a judge model, a simulation."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

Choice = Literal["a", "b", "tie"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two different responses to one prompt, in the order in which they are shown."""

    pair_id: str
    prompt_id: str
    prompt: str
    task: str
    split: str  # "train" or "heldout"
    response_a: str
    response_b: str


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
    """A pair with all its votes."""

    pair: Pair
    votes: tuple[Vote, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the votes on a pair add up to."""

    label: Choice
    agreement: float  # share of all votes that say the same as the label
    margin: float  # mean signed strength toward the label, never negative; 0 for a tie


def pair_id(prompt_id: str, response_a: str, response_b: str) -> str:
    """Identity of a comparison, whichever response is shown first: 16 hex digits."""
    first, second = sorted((response_a, response_b))
    return hashlib.sha256("\0".join((prompt_id, first, second)).encode()).hexdigest()[:16]


def aggregate(votes: Sequence[Vote]) -> Verdict:
    """The side with more votes; a tie when both have as many, or when more votes say tie than name that side.

    Raises:
        ValueError: there is no vote.
    """
    if not votes:
        raise ValueError("a pair without votes has no majority")
    count = Counter(vote.choice for vote in votes)
    side: Choice = "a" if count["a"] > count["b"] else "b"
    if count["a"] == count["b"] or count["tie"] > count[side]:
        return Verdict(label="tie", agreement=count["tie"] / len(votes), margin=0.0)
    signed = sum(vote.signed for vote in votes) / len(votes)
    return Verdict(label=side, agreement=count[side] / len(votes), margin=max(0.0, signed if side == "a" else -signed))
