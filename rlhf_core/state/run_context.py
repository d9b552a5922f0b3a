"""The edges of a trainer: what the seed is, who hears of its steps, who keeps its state, who trains with it."""

from dataclasses import dataclass

from rlhf_core.state.train_state import MetricSink, SaveCheckpoint, unheard, unkept
from rlhf_core.state.world import ALONE, World


@dataclass(frozen=True, kw_only=True, slots=True)
class RunContext:
    """What every trainer is given beside its settings, models and data; nothing of it says what is learned.

    Attributes:
        seed: address of every random choice of the run (`rlhf_core.state.rng`).
        pad_id: token that fills rows of unequal length.
        log: hears of each step.
        checkpoint: keeps the state, as often as the settings say.
        world: the processes that train together.
    """

    seed: int
    pad_id: int
    log: MetricSink = unheard
    checkpoint: SaveCheckpoint = unkept
    world: World = ALONE
