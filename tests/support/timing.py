"""Bounds on time that hold on a machine with other work as they do on an idle one."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager


def patience(seconds: float) -> float:
    """What may take `seconds` on an idle machine: as many more as there are processes that wait for a core."""
    return seconds * (1 + os.getloadavg()[0] / (os.cpu_count() or 1))


@contextmanager
def costs_at_most(cpu_seconds: float) -> Iterator[None]:
    """Check what the child processes that are started and awaited inside cost, whoever else is on the machine."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    yield
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert 0 < spent < cpu_seconds, f"{spent:.2f} CPU-seconds, {cpu_seconds} allowed"
