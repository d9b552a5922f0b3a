"""Errors that a person can act on, each with the exit code that the documentation promises."""

import math
from collections.abc import Iterable


class RlhfError(Exception):
    """A failure whose message says what is wrong, where, and how to cure it.

    Args:
        message: one line, `place: problem. Fix: cure`.
    """

    exit_code = 1


class ConfigError(RlhfError):
    """Usage or configuration is wrong."""

    exit_code = 2


class GateRefused(RlhfError):
    """A measured figure does not pass a gate."""

    exit_code = 3


class DataError(RlhfError):
    """Data is refused."""

    exit_code = 4


class WaitingForPeople(RlhfError):
    """A person's answer is missing; the run can go on once it is there."""

    exit_code = 5


class Diverged(RlhfError):
    """Training left the finite numbers; the last good checkpoint is kept."""

    exit_code = 6


def check_finite(numbers: Iterable[float], what: str, cure: str = "look at the model and at that row") -> None:
    """Compared with anything, NaN says no: a maximum passes over it, a bound lets it by, and a judge calls it worse.

    Raises:
        Diverged: a number is NaN or infinite; it is named by `what` and its place, from 0.
    """
    for place, number in enumerate(numbers):
        if not math.isfinite(number):
            raise Diverged(f"{what} {place} is {number}. Fix: {cure}")


class EnvironmentProblem(RlhfError):
    """Something around the run is missing or broken: disk, server, lock, model folder."""

    exit_code = 7
