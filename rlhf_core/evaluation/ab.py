"""A against B on the same prompts: wins, ties, losses, the win rate with its interval, and an exact test.

Win rate = (wins + ties / 2) / n. Its interval is Tango's score interval (`intervals.win_rate_interval`); the
p-value is the exact two-sided sign test over the prompts that are no tie. Where A is one of several candidates that
are held against the same B, both are corrected for that (`selection`): whichever candidate is taken afterwards, its
interval still means what it says.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from rlhf_core.evaluation.intervals import bounds, sign_test, too_few, why_no_bounds, win_rate_interval
from rlhf_core.evaluation.selection import confidence_of_each

Choice = Literal["first", "second", "tie"]
Answer = Choice | float  # the better one, or the probability that it is the first
Outcome = Literal["win", "tie", "loss"]
R = TypeVar("R")
# (prompts, responses shown first, responses shown second) -> which is better, a row each
Judge = Callable[[Sequence[str], Sequence[R], Sequence[R]], Sequence[Answer]]

_SHARES: dict[Answer, float] = {"first": 1.0, "second": 0.0, "tie": 0.5}


class Verdicts(NamedTuple):
    """What a judge that saw both orders says of A against B."""

    outcomes: list[Outcome]  # of A, one a prompt
    consistency: float | None  # share of prompts judged alike in both orders; None without prompts
    shares: list[float]  # probability that A's response is the better, a mean over both orders, one a prompt


def compare_scores(
    scores_a: Sequence[float], scores_b: Sequence[float], confidence: float = 0.95, tolerance: float = 1e-9
) -> dict[str, Any]:
    """Compare A with B by one score a prompt each; scores within `tolerance` of each other are a tie.

    Returns what `summarise` returns. Raises ValueError for unequal lengths and for scores that are not finite.
    """
    if len(scores_a) != len(scores_b):
        raise ValueError(f"{len(scores_a)} scores for A, {len(scores_b)} for B")
    difference = np.asarray(scores_a, dtype=np.float64) - np.asarray(scores_b, dtype=np.float64)
    if not np.isfinite(difference).all():
        row = int(np.flatnonzero(~np.isfinite(difference))[0])
        raise ValueError(f"row {row}: scores {scores_a[row]} and {scores_b[row]} must be finite")
    outcomes = np.where(difference > tolerance, "win", np.where(difference < -tolerance, "loss", "tie"))
    return summarise(outcomes.tolist(), confidence)


def summarise(outcomes: Sequence[Outcome], confidence: float = 0.95, candidates: int = 1) -> dict[str, Any]:
    """Return `wins`, `ties`, `losses`, `num_prompts`, `win_rate`, `win_rate_low`, `win_rate_high` and `p_value`.

    The interval is one of `candidates` that hold all at once with `confidence`; the p-value is multiplied by
    `candidates`, 1 at most. Without a single outcome the last four are `None`, with fewer than five the interval; then
    `undefined` says why.
    """
    counts = Counter(outcomes)
    wins, ties, losses = counts.pop("win", 0), counts.pop("tie", 0), counts.pop("loss", 0)
    if counts:
        raise ValueError(f"unknown outcome {next(iter(counts))!r}; expected 'win', 'tie' or 'loss'")
    summary: dict[str, Any] = {"wins": wins, "ties": ties, "losses": losses, "num_prompts": len(outcomes)}
    reason = too_few(len(outcomes))
    level = confidence_of_each(confidence, candidates)
    interval = None if reason else win_rate_interval(wins, ties, losses, level)
    summary |= {
        "win_rate": (wins + ties / 2.0) / len(outcomes) if outcomes else None,
        **bounds("win_rate", interval),
        "p_value": min(1.0, candidates * sign_test(wins, losses)) if outcomes else None,
    }
    return summary | ({"undefined": why_no_bounds(summary, "win_rate", reason)} if reason else {})


def both_orders(
    judge: Judge[R], prompts: Sequence[str], responses_a: Sequence[R], responses_b: Sequence[R], tie_within: float = 0.0
) -> Verdicts:
    """Show the judge A first, then B first; a prompt it judges differently in the two orders is a tie.

    A judge may answer with the probability that the response shown first is the better: within `tie_within` of 1/2 that
    is a tie, above it the first is better.

    Raises ValueError for unequal lengths and for a judge that does not answer every row.
    """
    if not len(prompts) == len(responses_a) == len(responses_b):
        raise ValueError(f"{len(prompts)} prompts, {len(responses_a)} responses of A, {len(responses_b)} of B")
    forward = _shares(judge, prompts, responses_a, responses_b)
    backward = [1.0 - share for share in _shares(judge, prompts, responses_b, responses_a)]
    first = [_outcome(share, tie_within) for share in forward]
    alike = [one == _outcome(share, tie_within) for one, share in zip(first, backward, strict=True)]
    outcomes: list[Outcome] = [one if same else "tie" for one, same in zip(first, alike, strict=True)]
    shares = [(one + other) / 2.0 for one, other in zip(forward, backward, strict=True)]
    return Verdicts(outcomes, sum(alike) / len(alike) if alike else None, shares)


def _outcome(share: float, tie_within: float) -> Outcome:
    if abs(share - 0.5) <= tie_within:
        return "tie"
    return "win" if share > 0.5 else "loss"


def _shares(judge: Judge[R], prompts: Sequence[str], first: Sequence[R], second: Sequence[R]) -> list[float]:
    """Probability that the response shown first is the better, one a prompt."""
    answers = list(judge(prompts, first, second))
    shares = [answer if isinstance(answer, float) else _SHARES.get(answer, -1.0) for answer in answers]
    if len(shares) != len(prompts) or not all(0.0 <= share <= 1.0 for share in shares):
        raise ValueError(
            f"the judge must answer 'first', 'second', 'tie' or a probability to each of {len(prompts)} rows"
        )
    return shares
