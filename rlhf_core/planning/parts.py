"""What the footprint of a stage is made of: moments of its memory, passes through models, and what both follow from."""

from dataclasses import dataclass
from typing import NamedTuple

from rlhf_core.config import Params
from rlhf_core.config.lora import LoraConfig
from rlhf_core.planning.activations import (
    FLOAT,
    PassSettings,
    Reading,
    kept_bytes,
    output_gradient_bytes,
    passing_bytes,
    sampler_bytes,
)
from rlhf_core.planning.shapes import ModelShape
from rlhf_core.planning.workload import Workload, mean

CPU_PASS_TOKENS, WIDE_ROWS, NARROW_ROWS = 2048, 256, 64
"""`rlhf_core.trainers.passes.CPU_PASS_TOKENS` and the rows at once of `rlhf_core.engine.batches`."""
KEPT_CHECKPOINTS = 3
"""Two that are kept and the one that is being written."""
HEAPED = (8 * 2**20, 2 * 2**25)
"""Sizes of a pass's largest tensors between which its others fill the heap with holes."""
HOLES = 1.37
"""Resident over kept, of one pass or of several of different lengths."""
TOKEN_BYTES = 40
"""A token in a list of Python's: a number of its own and the place that names it."""


class Moment(NamedTuple):
    """A point of a stage's life and the bytes that it holds then, beside the process itself."""

    name: str
    bytes: int


class Passes(NamedTuple):
    """Work of one kind.

    Attributes:
        kind: of `rlhf_core.planning.probe`: train, train_scores, read, read_scores, sample.
        tokens: that go through the layers; of sampling, of the prompts.
        responses: tokens that go through the output layer; of sampling, that are drawn.
        updates: optimiser steps.
    """

    kind: str
    tokens: float
    responses: float
    updates: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """What a stage takes.

    Attributes:
        parameters, trained: of the model that it makes; 0 for a stage without one.
        moments: of its memory.
        work: passes through models.
        texts: texts that become tokens.
        written, checkpoints: bytes on disk.
        steps: of the optimiser, or rollouts.
    """

    parameters: int = 0
    trained: int = 0
    moments: tuple[Moment, ...] = ()
    work: tuple[Passes, ...] = ()
    texts: int = 0
    written: int = 0
    checkpoints: int = 0
    steps: int = 0

    @property
    def peak(self) -> Moment:
        """The moment that needs most."""
        return max(self.moments, key=lambda moment: moment.bytes, default=Moment("libraries", 0))

    @property
    def tokens(self) -> int:
        """Tokens that go through a model or come out of one."""
        return round(sum(one.tokens + (one.responses if one.kind == "sample" else 0) for one in self.work))


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """What footprints are made of.

    Attributes:
        on_gpu: a GPU computes.
        pass_bytes: that writing or reading responses may take beside the models; None: whatever it takes.
    """

    params: Params
    shape: ModelShape
    workload: Workload
    on_gpu: bool = False
    pass_bytes: int | None = None

    def settings(self, lora: LoraConfig | None) -> PassSettings:
        """How passes are computed, with these adapters."""
        compute = self.params.compute
        return PassSettings(
            rank=lora.rank if lora else 0,
            checkpointing=compute.activation_checkpointing,
            half=compute.precision == "bfloat16",
            cpu=not self.on_gpu,
            compact=self.params.machine.compact_memory,
        )

    def trained(self, lora: LoraConfig | None, parameters: int) -> int:
        """Numbers that learn, of a model with so many."""
        return self.shape.adapter_parameters(lora) if lora else parameters

    @property
    def prompt(self) -> float:
        """Tokens of a prompt, on average."""
        return mean(self.workload.prompt_lengths)

    @property
    def scored_rows(self) -> int:
        """Most responses that a model reads at once in `reward` and `align`."""
        return self.params.compute.scored_rows or WIDE_ROWS

    @property
    def sampled_rows(self) -> int:
        """Most responses that are written at once, but in `generate`, which has a number of its own."""
        return self.params.compute.sampled_rows or WIDE_ROWS

    @property
    def new_tokens(self) -> float:
        """Tokens of a response that a model writes: as many as people's have."""
        longest = self.params.model.max_response_tokens
        known = [response for _, response in self.workload.demonstration_lengths]
        return min(longest, mean(known)) if known else longest


def training(
    held: int, trained: int, reading: Reading, settings: PassSettings, shape: ModelShape, *, several: bool
) -> list[Moment]:
    """The two moments of a step beside what is `held` all the time, weights and AdamW's moments.

    At the end of the forward half all is kept that the backward half needs, and of several passes the later ones find
    gradients there. At its end there are all gradients, and those of the embedding twice.
    """
    gradients, output = trained * FLOAT, output_gradient_bytes(shape, reading, settings)
    kept = with_holes(kept_bytes(shape, reading, settings), shape, reading, settings)
    return [
        Moment("training step", held + kept + output + (gradients if several else 0)),
        Moment("end of the step", held + gradients + output),
    ]


def with_holes(kept: int, shape: ModelShape, reading: Reading, settings: PassSettings) -> int:
    """What a pass keeps, with the holes that it leaves in glibc's heap where large blocks come from there.

    That is so for blocks up to 32 MiB; smaller ones than 4 MiB find their place again. Measured on SmolLM2-135M, a pass
    of 1,900 tokens and three of 1,500; `machine.compact_memory` leaves none.
    """
    largest = 2 * reading.tokens * shape.feed_forward * settings.item
    if settings.compact or not settings.cpu or not HEAPED[0] <= largest <= HEAPED[1]:
        return kept
    return int(kept * HOLES)


def sampler(planned: Planned, rows: int) -> int:
    """Bytes of a decoder that writes so many responses at once, to the longer half of the prompts."""
    lengths, model = planned.workload.prompt_lengths, planned.params.model
    width = min(model.max_prompt_tokens, max(lengths, default=model.max_prompt_tokens))
    settings = planned.settings(None)

    def bytes_of(count: int) -> int:
        return sampler_bytes(planned.shape, count, width, model.max_response_tokens, settings)

    weights = bytes_of(0) if planned.pass_bytes else 0
    while planned.pass_bytes and rows > 1 and bytes_of(rows) - weights > planned.pass_bytes:
        rows = -(-rows // 2)  # as `rlhf_core.engine.memory.fitting` halves a batch
    return bytes_of(rows)


def scoring(planned: Planned, reading: Reading, settings: PassSettings) -> int:
    """Bytes of reading responses without gradients, halved until `pass_bytes` holds them."""
    found, rows = passing_bytes(planned.shape, reading, settings), reading.tokens
    while planned.pass_bytes and found > planned.pass_bytes and rows > 1:
        rows, found = -(-rows // 2), -(-found // 2)
    return found
