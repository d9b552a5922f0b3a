"""Scores on a scale of their own: what a reward model and an ensemble of them have in common."""

import math

import torch
from torch import Tensor, nn


class Standardised(nn.Module):
    """Two buffers that bring raw scores to a scale: (raw score - shift) / scale, by 0 and 1 at first."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def standardise(self, mean: float, deviation: float) -> None:
        """From now on a raw score of `mean` is 0 and one of `mean + deviation` is 1.

        Raises:
            ValueError: `deviation` is not positive, so scores could not be told apart, or one of both is no number.
        """
        if not (0 < deviation < math.inf and math.isfinite(mean)):
            raise ValueError(
                f"the scores have mean {mean} and standard deviation {deviation}: at 0 the model scores everything "
                "alike, and otherwise both are finite"
            )
        self.shift.fill_(mean)
        self.scale.fill_(deviation)
