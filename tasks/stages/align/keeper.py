"""What an algorithm of stage `align` needs to be resumed and watched: the stage itself, or a link of a chain."""

from typing import Protocol

from rlhf_core.state.train_state import MetricSink, TrainState


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
