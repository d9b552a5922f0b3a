"""How much one caller, and all together, may ask of a server."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

MOST_CALLERS = 10_000
"""Callers whose budgets are remembered; beyond, those with a full one are forgotten."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a server takes.

    Attributes:
        response_tokens: the longest response that may be asked for, and what one gets that asks for none.
        body_bytes: of a request.
        waiting: responses that may wait for a free row; more are told to come again.
        choices: responses to one request: its `n` times its prompts.
        per_minute: requests a minute of one caller; 0 for any number.
        stop_texts: of a request.
        grace_s: how long requests under way have when the server goes down.
    """

    response_tokens: int = 1024
    body_bytes: int = 2**20
    waiting: int = 128
    choices: int = 16
    per_minute: int = 600
    stop_texts: int = 4
    grace_s: float = 30.0


class RateLimiter:
    """A bucket of tokens a caller, which fills by `per_minute` a minute and holds that many.

    Args:
        per_minute: see above; 0 lets everybody by.
        now: seconds on a clock that never goes back.
    """

    def __init__(self, per_minute: int, now: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self.now = per_minute, now
        self.buckets: dict[str, tuple[float, float]] = {}

    def wait_s(self, caller: str) -> float:
        """Take a token: 0.0, or how many seconds to wait where there is none."""
        if not self.per_minute:
            return 0.0
        now, most, rate = self.now(), float(self.per_minute), self.per_minute / 60
        held, since = self.buckets.get(caller, (most, now))
        held = min(most, held + (now - since) * rate)
        if held < 1.0:
            return (1.0 - held) / rate
        self.buckets[caller] = held - 1.0, now
        if len(self.buckets) > MOST_CALLERS:
            self._forget(now, rate)
        return 0.0

    def _forget(self, now: float, rate: float) -> None:
        full = self.per_minute - 1.0
        self.buckets = {
            caller: (held, since)
            for caller, (held, since) in self.buckets.items()
            if math.fsum((held, (now - since) * rate)) < full
        }
