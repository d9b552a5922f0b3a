"""Bringing scores to a known scale before they become rewards: running moments and quantiles.

Shape suffixes: B = rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_core.objectives.masked import ROUNDING_UNITS, SumOver, here, rounding_variance

LEAST_SPREAD = 1e-4
"""Two quantiles of scores that lie no further apart are one: the same floor that whitening has under its deviation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """Count, mean and sum of squared deviations of all numbers seen: plain floats, which JSON keeps to the bit."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def variance(self) -> float:
        """Population variance; 0 for no number at all."""
        return self.squares / self.count if self.count else 0.0

    @classmethod
    def of(cls, values: Tensor, across: SumOver = here) -> "Moments":
        """The moments of all elements, of all processes that `across` sums over, taken in float64."""
        wide = values.detach().double()
        count = across(wide.new_tensor(float(wide.numel())))
        if count == 0:
            return cls()
        mean = across(wide.sum()) / count
        return cls(count=count.item(), mean=mean.item(), squares=across((wide - mean).square().sum()).item())

    def merged(self, other: "Moments") -> "Moments":
        """The moments of both lots together (Chan, Golub & LeVeque 1979, eq. 2.1): no lot is read again."""
        count = self.count + other.count
        if count == 0:
            return self
        apart = other.mean - self.mean
        return Moments(
            count=count,
            mean=self.mean + apart * other.count / count,
            squares=self.squares + other.squares + apart * apart * self.count * other.count / count,
        )


def normalise_scores(scores_B: Tensor, moments: Moments, eps: float = 1e-8) -> Tensor:
    """(score - mean) / std; `eps` and the variance of rounding (scores are float32 numbers) stand beside the variance.

    A score belongs to a whole response, so moving its mean moves every response alike. Rewards of single tokens must
    not be moved so: a constant would pay for length.
    """
    floor = eps + float(rounding_variance(moments.mean, torch.float32))
    return (scores_B - moments.mean) / (moments.variance + floor) ** 0.5


def score_quantiles(scores_B: Tensor, low: float, high: float) -> tuple[float, float]:
    """The scores below which the shares `low` and `high` lie, linear between neighbours (NumPy's default rule)."""
    points = torch.tensor([low, high], dtype=torch.float64, device=scores_B.device)
    below, above = torch.quantile(scores_B.detach().double().flatten(), points).tolist()
    return below, above


def tell_apart(low_score: float, high_score: float) -> bool:
    """Whether two quantiles of float32 scores lie further apart than `LEAST_SPREAD` and than rounding puts them."""
    rounding = ROUNDING_UNITS * torch.finfo(torch.float32).eps * max(abs(low_score), abs(high_score))
    return high_score - low_score > max(LEAST_SPREAD, rounding)


def scale_by_quantiles(scores_B: Tensor, low_score: float, high_score: float) -> Tensor:
    """Put `low_score` at -1 and `high_score` at +1, linearly, also outside: outliers do not set the scale.

    Raises ValueError when the two do not `tell_apart` anything, which leaves no scale.
    """
    if not tell_apart(low_score, high_score):
        raise ValueError(f"quantiles {low_score} and {high_score} do not rise; the scores are (nearly) all alike")
    return 2.0 * (scores_B - low_score) / (high_score - low_score) - 1.0
