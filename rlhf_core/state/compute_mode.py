"""In which numbers models are computed, and what they keep for the backward pass: one setting of the process.

Set once, where threads and deterministic algorithms are set (`tasks.frame.place.prepare_device`), it holds for every
model of the process: the policy, its reference, reward and value models. The functions that run a model
(`rlhf_core.engine.states`, `rlhf_core.rollout.logprobs`, the decoders of `rlhf_core.rollout`) obey it, so trainers need
not know.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Precision = Literal["float32", "bfloat16"]
CudaGraphs = Literal["auto", "off"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeMode:
    """How models are computed.

    Attributes:
        precision: of matrix products and attention. `bfloat16` leaves weights, gradients, norms, the residual stream,
            log-probabilities, scores and losses in float32; `float32` takes the weights' own type.
        activation_checkpointing: keep the input of each layer alone and compute the layer again in the backward pass.
        cuda_graphs: `auto`: on a GPU a step of decoding is launched as one graph where that works; `off`: kernel by
            kernel. The kernels and their numbers are the same.
        sampled_rows: most responses that are written at once, in place of what the caller asks for; None: as it asks.
        scored_rows: most responses that a model reads at once, in the same way.
        pass_bytes: memory that writing or reading them may take beside the models; None: as much as it takes.
    """

    precision: Precision = "float32"
    activation_checkpointing: bool = False
    cuda_graphs: CudaGraphs = "auto"
    sampled_rows: int | None = None
    scored_rows: int | None = None
    pass_bytes: int | None = None


_current = ComputeMode()


def compute_mode() -> ComputeMode:
    """The mode in force."""
    return _current


def set_compute_mode(mode: ComputeMode) -> None:
    """Set the mode of this process."""
    global _current
    _current = mode


@contextmanager
def computing(mode: ComputeMode) -> Iterator[None]:
    """The mode for a block of code."""
    before = compute_mode()
    set_compute_mode(mode)
    try:
        yield
    finally:
        set_compute_mode(before)
