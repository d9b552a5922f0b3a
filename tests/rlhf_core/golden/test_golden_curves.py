"""Each trainer's first twenty steps against the recorded ones, number by number.

Tolerance: 1e-5 of a number, plus 1e-6 for those that are differences of larger ones (margins, divergences). Weights
that differ in their last bit (6e-8) moved no figure by more than a third of that over the twenty steps; a changed mask,
mean, coefficient or order of rows moves the third or fourth digit at the latest.
"""

import pytest
from support.golden import CURVES, STEPS, read, run

REL, ABS = 1e-5, 1e-6


@pytest.mark.parametrize("name", CURVES)
def test_the_curve_is_the_recorded_one(name: str) -> None:
    recorded, now = read(name), run(name)
    assert len(recorded) == len(now) == STEPS
    for step, (before, after) in enumerate(zip(recorded, now, strict=True), start=1):
        assert after == pytest.approx(before, rel=REL, abs=ABS), f"step {step} of {', '.join(CURVES[name][1])}"
