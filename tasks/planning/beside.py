"""What a stage takes beside models: tables, texts that become tokens, statistics. Small, and much of a small run.

Measured on the demo, two cores of 2023, a core's seconds; they go with rows and not with the model.
"""

from collections.abc import Mapping
from typing import NamedTuple

from rlhf_core.planning.parts import Footprint, Planned


class Beside(NamedTuple):
    """Seconds of a stage whatever its rows, and for each thousand of what it goes through."""

    once: float
    a_thousand: float


COSTS: Mapping[str, Beside] = {
    "validate": Beside(1.5, 0.26),
    "sft": Beside(1.0, 0.05),
    "generate": Beside(0.6, 0.3),
    "label": Beside(0.6, 0.33),
    "preferences": Beside(0.8, 0.3),
    "reward": Beside(1.5, 0.5),
    "align": Beside(1.5, 0.1),
    "combine": Beside(1.5, 0.1),
    "evaluate": Beside(1.5, 0.3),
    "regressions": Beside(0.3, 0.2),
    "report": Beside(0.3, 0.0),
}


def seconds_beside(stage: str, planned: Planned, found: Footprint) -> float:
    """Seconds of a stage that no model takes; 0 for a stage of somebody's own."""
    name = stage.partition("@")[0]
    cost = COSTS.get(name)
    if cost is None:
        return 0.0
    return cost.once + cost.a_thousand * _rows(name, planned) / 1000 + found.texts * planned.workload.text_s


def _rows(name: str, planned: Planned) -> float:
    """The rows that a stage goes through, as far as they are known before it runs."""
    work = planned.workload
    match name:
        case "validate" | "sft":
            return work.demonstrations + work.kept + work.prompts + work.heldout_prompts
        case "generate" | "align" | "evaluate" | "regressions":
            return work.prompts + work.heldout_prompts
        case _:
            return work.pairs + work.heldout_pairs
