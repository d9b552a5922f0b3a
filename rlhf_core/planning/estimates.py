"""Seconds and bytes of a stage, from its footprint and what a probe measured of one layer and of the rest."""

from dataclasses import dataclass
from typing import NamedTuple

from rlhf_core.planning.parts import Passes
from rlhf_core.planning.probe import Probed, ProbeRequest

LEAVING = 1.1
"""Rows over tokens while a batch is sampled: rows that have ended leave in fifths (`sampler.DROP_SHARE`)."""
BASE_BYTES = 490 * 2**20
"""What a stage's process holds with its libraries alone, where no probe has measured it."""
SLACK = 1.1
"""Resident over the tensors that the formulas count: what comes and goes in a backward pass, and holes of the heap."""
READY_BYTES, TRAINED_BYTES = 45 * 2**20, 100 * 2**20
"""Code that libraries load when they first compute, and programs that oneDNN makes, one for each shape that it meets:
of a stage that reads, and of one that trains, whose passes have more shapes. Measured on the demo."""


class Line(NamedTuple):
    """A cost that grows with the layers: `rest` and so much `a_layer`."""

    rest: float
    a_layer: float

    def at(self, layers: int) -> float:
        """Of a model with so many layers."""
        return self.rest + self.a_layer * layers


def line(values: dict[int, float]) -> Line:
    """Through the values at two depths; where noise would have a layer cost less than nothing, it costs nothing."""
    ordered = sorted(values.items())
    (first, low), (second, high) = ordered[0], ordered[-1]
    if first == second:
        return Line(0.0, low / first)
    slope = max(0.0, (high - low) / (second - first))
    return Line(max(0.0, low - slope * first), slope)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Seconds of each kind of work, as a probe measured them.

    Args:
        probed: what was measured.
        request: of what.
        layers: of the model.
    """

    probed: Probed
    request: ProbeRequest
    layers: int

    def seconds(self, one: Passes) -> float:
        """What so much work takes."""
        if one.kind == "sample":
            return self._sampling(one)
        found = self.probed.work[one.kind]
        passing = line({depth: work.seconds - work.update_s for depth, work in found.items()})
        update = line({depth: work.update_s for depth, work in found.items()}).at(self.layers)
        layers = one.tokens / self.probed.tokens * passing.a_layer * self.layers
        others = one.responses / self.probed.responses if one.responses else one.tokens / self.probed.tokens
        return layers + others * passing.rest + one.updates * update

    def _sampling(self, one: Passes) -> float:
        """Prompts are read, then each token is drawn in a step that all rows of a batch take together."""
        found = self.probed.work["sample"]
        reading = line({depth: work.seconds for depth, work in found.items()}).at(self.layers)
        step = line({depth: work.step_s for depth, work in found.items()}).at(self.layers)
        prompts = one.tokens / sum(self.request.sampled)
        return prompts * reading + LEAVING * one.responses / len(self.request.sampled) * step


def resident_bytes(formula: int, base: int | None, *, trains: bool) -> int:
    """What a process is resident with whose tensors add up to `formula` at its peak."""
    return int((base or BASE_BYTES) + (TRAINED_BYTES if trains else READY_BYTES) + SLACK * formula)
