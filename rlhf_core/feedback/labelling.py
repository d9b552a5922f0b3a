"""Votes on pairs of responses and what they add up to, whoever voted: people, a judge model, a simulation."""

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, Self

from rlhf_core.data.agreement import fleiss_kappa, krippendorff_alpha, ordinal_alpha
from rlhf_core.data.kinds import OVERALL, UNNAMED

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
    """A pair with all its votes; `rankings`: identities of those that some of the votes come from."""

    pair: Pair
    votes: tuple[Vote, ...]
    rankings: tuple[str, ...] = ()


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


def make_pairs(
    prompt_id: str, prompt: str, task: str, split: str, responses: Iterable[str], rng: AddressedRandom
) -> list[Pair]:
    """All pairs of different responses to a prompt, each shown in an order drawn from its own address."""
    pairs = []
    for first, second in combinations(dict.fromkeys(responses), 2):
        identity = pair_id(prompt_id, first, second)
        response_a, response_b = sorted((first, second))
        if rng(f"order/{identity}").random() < 0.5:
            response_a, response_b = response_b, response_a
        pairs.append(
            Pair(
                pair_id=identity,
                prompt_id=prompt_id,
                prompt=prompt,
                task=task,
                split=split,
                response_a=response_a,
                response_b=response_b,
            )
        )
    return pairs


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


def annotator_table(ballots: Iterable[Ballot]) -> dict[str, dict[str, Any]]:
    """What each annotator did, by name in sorted order, over all criteria; each ballot is on one.

    Returns:
        For each: `num_votes`; `tie_share`; `first_share`, of the votes that take a side, those for the response
        shown first; `agreement`, the share of votes equal to the verdict of all other annotators of the pair;
        `mean_seconds`. A figure without anything to count is None.
    """
    votes: defaultdict[str, list[Vote]] = defaultdict(list)
    agrees: defaultdict[str, list[bool]] = defaultdict(list)
    for ballot in ballots:
        for place, vote in enumerate(ballot.votes):
            votes[vote.annotator].append(vote)
            around = [*ballot.votes[:place], *ballot.votes[place + 1 :]]
            others = [one for one in around if one.annotator != vote.annotator or one.annotator == UNNAMED]
            if others:
                agrees[vote.annotator].append(vote.choice == aggregate(others).label)
    return {
        name: {
            "num_votes": len(votes[name]),
            "tie_share": mean_or_none([vote.choice == "tie" for vote in votes[name]]),
            "first_share": mean_or_none([vote.choice == "a" for vote in votes[name] if vote.choice != "tie"]),
            "agreement": mean_or_none(agrees[name]),
            "mean_seconds": mean_or_none([vote.seconds for vote in votes[name] if vote.seconds is not None]),
        }
        for name in sorted(votes)
    }


def summary(ballots: Sequence[Ballot], verdicts: Sequence[Verdict]) -> dict[str, int | float | None]:
    """Headline figures of a labelling round on one criterion; one that is undefined for its votes is None.

    Returns:
        Counts; `tie_share` of the pairs; `mean_agreement` over all pairs; `mean_vote_margin` and `first_share` (the
        response shown first is preferred) over the decided ones; Fleiss' kappa and Krippendorff's alpha of the
        choices, and the ordinal alpha of the signed strengths.
    """
    choices = [[vote.choice for vote in ballot.votes] for ballot in ballots]
    decided = [verdict for verdict in verdicts if verdict.label != "tie"]
    return {
        "num_labelled_pairs": len(ballots),
        "num_labelled_heldout_pairs": sum(ballot.pair.split == "heldout" for ballot in ballots),
        "num_votes": sum(map(len, choices)),
        "num_annotators": len({vote.annotator for ballot in ballots for vote in ballot.votes}),
        "tie_share": mean_or_none([verdict.label == "tie" for verdict in verdicts]),
        "mean_agreement": mean_or_none([verdict.agreement for verdict in verdicts]),
        "mean_vote_margin": mean_or_none([verdict.margin for verdict in decided]),
        "first_share": mean_or_none([verdict.label == "a" for verdict in decided]),
        "fleiss_kappa": fleiss_kappa(choices),
        "krippendorff_alpha": krippendorff_alpha(choices),
        "strength_alpha": ordinal_alpha([[vote.signed for vote in ballot.votes] for ballot in ballots]),
    }


def mean_or_none(values: Sequence[float]) -> float | None:
    """Arithmetic mean, None of nothing."""
    return sum(values) / len(values) if values else None
