"""Learning rates as a pure function of the step, so that a schedule has no state to save."""

import math
from typing import Literal


def learning_rate(
    step: int,
    total: int,
    peak: float,
    warmup: int,
    min_share: float,
    shape: Literal["cosine", "linear"],
) -> float:
    """Rate of optimiser step `step` (from 0) of `total`.

    It rises in a line over the first `warmup` steps (step 0 already learns: peak / warmup), stands at `peak` at
    step `warmup`, and falls to `peak * min_share` at the last step, in a line or along a cosine (Loshchilov and
    Hutter 2017, eq. 5, without restarts).
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min((step - warmup) / max(total - 1 - warmup, 1), 1.0)
    share = (1 + math.cos(math.pi * progress)) / 2 if shape == "cosine" else 1 - progress
    return peak * (min_share + (1 - min_share) * share)
