"""Errors that a person can act on, each with the exit code that the documentation promises."""


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


class EnvironmentProblem(RlhfError):
    """Something around the run is missing or broken: disk, server, lock, model folder."""

    exit_code = 7
