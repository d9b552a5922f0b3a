"""Who keeps a training run and hears of it: the stage itself, or a link of the chain in stage `align`."""

from typing import Protocol

from rlhf_core.state.run_context import RunContext
from rlhf_core.state.train_state import MetricSink, TrainState
from tasks.frame.stage import Stage


class Keeper(Protocol):
    """Keeps a training run's state and hears of its steps."""

    @property
    def log(self) -> MetricSink:
        """Hears of every step."""
        ...

    def restore(self, state: TrainState) -> TrainState:
        """Load the newest state that was kept into `state`, if there is one, and return it."""
        ...

    def checkpoint(self, state: TrainState) -> None:
        """Keep `state` as it stands."""
        ...


def run_context(stage: Stage, keeper: Keeper, pad_id: int) -> RunContext:
    """What a trainer is given of a stage: its seed and processes, and the keeper's ears and shelf."""
    return RunContext(
        seed=stage.params.seed, pad_id=pad_id, log=keeper.log, checkpoint=keeper.checkpoint, world=stage.world
    )
