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
Outcome = Literal["win", "tie", "loss"]
R = TypeVar("R")
# (prompts, responses shown first, responses shown second) -> the better one of each row
Judge = Callable[[Sequence[str], Sequence[R], Sequence[R]], Sequence[Choice]]

TIE_WITHIN = {"gold": 1e-9, "reward_model": 1e-4}
"""How near two scores must be to count as equal. A reward model's scores have a standard deviation of about 1 and
float32 noise near 1e-6 that depends on the batch: with less room than this the same response, written by both
models, would win or lose by chance where it must tie."""

_SWAPPED: dict[Choice, Choice] = {"first": "second", "second": "first", "tie": "tie"}
_OUTCOME: dict[Choice, Outcome] = {"first": "win", "second": "loss", "tie": "tie"}


class Verdicts(NamedTuple):
    """What a judge that saw both orders says of A against B."""

    outcomes: list[Outcome]  # of A, one a prompt
    consistency: float | None  # share of prompts judged alike in both orders; None without prompts


def compare_scores(
    scores_a: Sequence[float], scores_b: Sequence[float], confidence: float = 0.95, tolerance: float = 1e-9
) -> dict[str, Any]:
    """Compare A with B by one score a prompt each; scores within `tolerance` of each other are a tie.

    `TIE_WITHIN` holds the tolerance of each judge.

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
    judge: Judge[R], prompts: Sequence[str], responses_a: Sequence[R], responses_b: Sequence[R]
) -> Verdicts:
    """Show the judge A first, then B first; a prompt it judges differently in the two orders is a tie."""
    if not len(prompts) == len(responses_a) == len(responses_b):
        raise ValueError(f"{len(prompts)} prompts, {len(responses_a)} responses of A, {len(responses_b)} of B")
    forward = _choices(judge, prompts, responses_a, responses_b)
    backward = [_SWAPPED[choice] for choice in _choices(judge, prompts, responses_b, responses_a)]
    alike = [one == other for one, other in zip(forward, backward, strict=True)]
    outcomes = [_OUTCOME[choice] if same else "tie" for choice, same in zip(forward, alike, strict=True)]
    return Verdicts(outcomes, sum(alike) / len(alike) if alike else None)


def _choices(judge: Judge[R], prompts: Sequence[str], first: Sequence[R], second: Sequence[R]) -> list[Choice]:
    choices = list(judge(prompts, first, second))
    if len(choices) != len(prompts) or not set(choices) <= set(_SWAPPED):
        raise ValueError(f"the judge must answer 'first', 'second' or 'tie' to each of {len(prompts)} rows")
    return choices
