"""What looking more than once costs: levels of intervals that hold although the best of several was taken.

The best of five candidates that are all equal to the baseline has a 95 % interval above one half in one run of eight.
Bonferroni's inequality, which asks nothing of how the candidates depend on each other, gives each of them its part of
the error; attempts that come one after the other, of which nobody knows how many there will be, get parts that add up
to the whole however many come (alpha spending: Javanmard and Montanari 2018, Online rules for control of false
discovery rate, section 2).
"""

import math


def confidence_of_each(confidence: float, candidates: int) -> float:
    """Return the level of each of several intervals that are to hold all at once with `confidence`."""
    if candidates < 1:
        raise ValueError(f"{candidates} candidates are no choice")
    return 1.0 - (1.0 - confidence) / candidates


def confidence_of_attempt(confidence: float, attempt: int) -> float:
    """Return the level of the interval at one of any number of attempts, counted from 1.

    The error 1 - confidence is spent in parts of 6 / (pi * attempt)^2, which are 1 in sum: 0.61 of it at the first
    attempt, 0.15 at the second, 0.07 at the third.
    """
    if attempt < 1:
        raise ValueError(f"attempt {attempt}: attempts are counted from 1")
    return 1.0 - (1.0 - confidence) * 6.0 / (math.pi * attempt) ** 2
