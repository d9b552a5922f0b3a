"""Everything that a trainer changes while it runs; what is not here can be recomputed from configuration and step."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class MetricSink(Protocol):
    """Where a trainer reports a step to; the sink decides who listens.

    Args of the call:
        step: steps done. total: steps planned. metrics: namespaced figures of this step.
        tokens: non-padding tokens processed since training began.
    """

    def __call__(self, step: int, total: int, metrics: Mapping[str, float], tokens: int) -> None: ...


class SaveCheckpoint(Protocol):
    """Keeps the state as it stands, so that a later process can go on from it."""

    def __call__(self, state: "TrainState") -> None: ...


@dataclass(kw_only=True)
class TrainState:
    """The state of one training run.

    Attributes:
        step: optimiser steps done (rollouts for PPO).
        modules: the networks that training changes, by name.
        optimizers: their optimisers, by name.
        extra: JSON-able counters and controllers (best loss, adaptive coefficients).
        tensors: tensors beside the modules (best weights, moments, cached log-probs).
        history: one row a reported step, `{"step": ..., "loss/train": ...}`; becomes the stage's curves.
    """

    step: int = 0
    modules: dict[str, nn.Module] = field(default_factory=dict)
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)

    def record(self, metrics: Mapping[str, float]) -> None:
        """Append a row of figures for the current step to the history."""
        self.history.append({"step": self.step, **metrics})


def unheard(step: int, total: int, metrics: Mapping[str, float], tokens: int) -> None:
    """A `MetricSink` for training that nobody watches; the state's history has the figures all the same."""


def unkept(state: TrainState) -> None:
    """A `SaveCheckpoint` for training that need not survive its process."""
