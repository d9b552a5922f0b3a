"""Weights for examples that are still hard: they follow the loss each one had when it was last seen.

Like the focal loss (Lin et al. 2017), which weights by how wrong the model is now, but by whole examples, and by a
running mean of their losses, so that the weights of a step are known before its forward pass and are the same in
every process and after a resume.
Shape suffixes: N = all examples.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_core.config.sft import HardExamplesConfig


def unseen(count: int) -> Tensor:
    """Running losses before any example was seen, losses_N: not a number."""
    return torch.full((count,), torch.nan, dtype=torch.float64)


def weights(losses_N: Tensor, rows: Sequence[int], cfg: HardExamplesConfig) -> list[float]:
    """Weight of each of `rows`: (its running loss over the mean of all that were seen) ** exponent, within bounds.

    An example that was not seen yet weighs 1.
    """
    seen_N = ~losses_N.isnan()
    mean = losses_N[seen_N].mean() if seen_N.any() else torch.tensor(1.0)
    relative = losses_N[list(rows)] / mean.clamp_min(1e-12)
    bounded = (relative**cfg.exponent).clamp(1 / cfg.max_weight, cfg.max_weight)
    return bounded.nan_to_num(1.0).tolist()


def follow(losses_N: Tensor, rows: Sequence[int], now: Sequence[float], memory: float) -> None:
    """Take the losses that `rows` have `now` into the running means, in place; one that is not finite counts not."""
    for row, loss in zip(rows, now, strict=True):
        before = losses_N[row].item()
        mixed = loss if before != before else memory * before + (1 - memory) * loss  # a NaN differs from itself
        if abs(mixed) < float("inf"):
            losses_N[row] = mixed
