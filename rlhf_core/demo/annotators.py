"""Simulated annotators of the demo world: they see what the gold scorer sees, through bias and noise."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from rlhf_core.demo.gold import CRITERIA, WEIGHTS, Grade, grade
from rlhf_core.feedback.ballots import AddressedRandom, Ballot, Majority, Pair, Vote, mean_or_none

_TIE_BELOW = 0.03  # differences of worth that nobody can tell
_STRENGTH_STEPS = (0.12, 0.30)  # |difference| from which a vote has strength 2, and 3
_MAX_BIAS_WORDS = 60  # length impresses no further


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedAnnotator:
    """One simulated person. Worths are on the gold scorer's scale, 0 to 1.

    `taste` multiplies the gold weight of a criterion (1 where absent). The flattery bias has no limit: it is what
    a policy can learn to exploit.
    """

    name: str
    taste: dict[str, float] = field(default_factory=dict)
    length_bias: float = 0.0  # worth of 40 extra words
    flattery_bias: float = 0.0  # worth of each polite sentence
    first_bias: float = 0.0  # worth of being shown first
    noise: float = 0.0  # standard deviation of the difference
    careless: float = 0.0  # share of votes given without reading
    words_per_second: float = 4.0

    def worth(self, grade: Grade) -> float:
        """What this annotator thinks a reply is worth, before noise."""
        merit = sum(WEIGHTS[name] * self.taste.get(name, 1.0) * getattr(grade, name) for name in CRITERIA)
        length = self.length_bias * min(grade.words, _MAX_BIAS_WORDS) / 40
        return merit + length + self.flattery_bias * grade.polite

    def vote(self, rng: random.Random, grade_a: Grade, grade_b: Grade) -> Vote:
        """Compare two replies shown in the order a, b."""
        reading = (grade_a.words + grade_b.words) / self.words_per_second
        if rng.random() < self.careless:
            signed, seconds = rng.choice((-2, -1, 0, 1, 2)), rng.uniform(1.0, 2.5)
        else:
            difference = self.worth(grade_a) - self.worth(grade_b) + self.first_bias
            signed = _signed_strength(difference + rng.gauss(0.0, self.noise))
            seconds = 2.0 + reading * rng.lognormvariate(0.0, 0.3)
        return Vote.from_signed(self.name, signed, seconds=round(seconds, 1))


def _signed_strength(difference: float) -> int:
    size = abs(difference)
    if size < _TIE_BELOW:
        return 0
    strength = 1 + sum(size >= step for step in _STRENGTH_STEPS)
    return strength if difference > 0 else -strength


ANNOTATORS = (
    SimulatedAnnotator(name="sim-alma", flattery_bias=0.02, noise=0.04, careless=0.02),
    SimulatedAnnotator(
        name="sim-boris",
        taste={"helpful": 1.1, "truthful": 0.9, "harmless": 0.9, "concise": 0.7},
        length_bias=0.06,
        flattery_bias=0.05,
        first_bias=0.02,
        noise=0.06,
        careless=0.04,
    ),
    SimulatedAnnotator(
        name="sim-chidi",
        taste={"helpful": 0.8, "truthful": 1.3, "harmless": 1.2},
        flattery_bias=0.04,
        noise=0.05,
        careless=0.03,
    ),
    SimulatedAnnotator(
        name="sim-dana",
        taste={"truthful": 0.7, "concise": 0.5},
        length_bias=0.10,
        flattery_bias=0.09,
        first_bias=0.03,
        noise=0.08,
        careless=0.08,
    ),
    SimulatedAnnotator(  # the careless one
        name="sim-emil",
        taste={"harmless": 0.8},
        length_bias=0.04,
        flattery_bias=0.04,
        first_bias=0.05,
        noise=0.10,
        careless=0.20,
    ),
)


def simulated_ballots(pairs: Iterable[Pair], rng: AddressedRandom) -> Iterator[Ballot]:
    """Let every simulated annotator vote on every pair, judging by the texts alone, as a person would.

    Raises:
        DataError: a prompt is not one of the demo world.
    """
    for pair in pairs:
        grade_a, grade_b = grade(pair.prompt, pair.response_a), grade(pair.prompt, pair.response_b)
        votes = (
            annotator.vote(rng(f"vote/{pair.pair_id}/{annotator.name}"), grade_a, grade_b) for annotator in ANNOTATORS
        )
        yield Ballot(pair=pair, votes=tuple(votes))


def gold_agreement(ballots: Iterable[Ballot], verdicts: Iterable[Majority]) -> float | None:
    """Share of the decided pairs with different gold scores whose label is the response with the higher one."""
    agrees = []
    for ballot, verdict in zip(ballots, verdicts, strict=True):
        pair = ballot.pair
        difference = grade(pair.prompt, pair.response_a).gold - grade(pair.prompt, pair.response_b).gold
        if verdict.label != "tie" and difference:
            agrees.append((difference > 0) == (verdict.label == "a"))
    return mean_or_none(agrees)
