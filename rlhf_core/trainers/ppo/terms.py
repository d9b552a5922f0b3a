"""Rewards beside the reward model's score: one number a response, each with a weight.

Built in are `length` and `diversity`; anything else is a function from outside that takes responses and gives numbers.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rlhf_core.errors import DataError
from rlhf_core.state.world import World
from rlhf_core.trainers.ppo.replay import Written

LARGEST = 3.4e38
"""Rewards are float32 numbers: larger ones would be infinite there, and their means in float64 too."""

Rate = Callable[[Sequence[Written]], Sequence[float]]
"""Gives each response a number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardTerm:
    """A further reward.

    Attributes:
        name: what reports call it.
        weight: its numbers count so many times.
        rate: makes the numbers.
        compares: it looks at all responses of a rollout together, so every process gives it all of them; else each
            process gives it its own.
    """

    name: str
    weight: float
    rate: Rate
    compares: bool = False


def length_term(weight: float, max_new_tokens: int) -> RewardTerm:
    """A response's tokens as a share of the limit: 0 to 1. A negative weight is a price on length."""
    return RewardTerm(
        name="length",
        weight=weight,
        rate=lambda rows: [len(row.response_ids) / max_new_tokens for row in rows],
    )


def diversity_term(weight: float) -> RewardTerm:
    """How rarely the rollout's other responses say the same: see `rarity`."""
    return RewardTerm(name="diversity", weight=weight, rate=rarity, compares=True)


def rarity(rows: Sequence[Written]) -> list[float]:
    """Mean over a response's token pairs of the share of the other responses that lack the pair: 0 to 1.

    1 says that no other response has a pair in common with this one, 0 that all others hold all of its pairs. A
    response of one token has that token in the place of a pair.
    """
    held = [_pairs(row.response_ids) for row in rows]
    holders = Counter(pair for pairs in held for pair in pairs)
    others = max(len(rows) - 1, 1)
    return [sum(1.0 - (holders[pair] - 1) / others for pair in pairs) / len(pairs) for pairs in held]


def rate_responses(term: RewardTerm, rows: Sequence[Written], world: World) -> list[float]:
    """The term's number of every response, without its weight, the same in all processes.

    Raises:
        DataError: not one finite number a response.
    """
    asked = list(rows) if term.compares else world.share(rows)
    rates = checked_rates(term.name, term.rate(asked), len(asked))
    return rates if term.compares else world.collect(rates)


def checked_rates(name: str, rates: Sequence[float], count: int) -> list[float]:
    """The numbers as floats.

    Raises:
        DataError: not one finite number a response.
    """
    try:
        numbers = [float(rate) for rate in rates]
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{name}: it returned {rates!r:.80}. Fix: one number a response ({error})") from error
    if len(numbers) != count:
        raise DataError(f"{name}: {len(numbers)} numbers for {count} responses. Fix: one number a response, in order")
    for place, number in enumerate(numbers):
        if not abs(number) <= LARGEST:  # NaN is at most nothing
            raise DataError(
                f"{name}: {number} for response {place} of {count}. Fix: finite numbers only, of {LARGEST:.1e} at most"
            )
    return numbers


def _pairs(ids: Sequence[int]) -> set[tuple[int, ...]]:
    return set(pairwise(ids)) or {tuple(ids)}
