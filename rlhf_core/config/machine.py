"""How a run uses the machine it is on; nothing here decides a byte of what it makes."""

from pydantic import Field, PositiveFloat, PositiveInt

from rlhf_core.config.base import Section


class MachineConfig(Section):
    """How a run uses the machine. No byte depends on it, so no stage runs again when it changes."""

    at_once: PositiveInt | None = Field(
        None,
        description="stages that are independent of each other, and models within `evaluate`, worked on side by side "
        "at most; null: as many as cores (over `compute.threads`) and free memory allow, one where a GPU computes",
    )
    compact_memory: bool = Field(
        False,
        description="stages on a CPU give large tensors back to the system when they are done with, so that no "
        "memory is lost in holes between others: about a third of what a middle-sized model's passes keep, for up to a "
        "fifth more time",
    )
    system_metrics_every: PositiveFloat | None = Field(
        10.0,
        description="seconds between two readings of processors, memory, disk, network and GPU on a stage's MLflow run "
        "(System metrics); null: none",
    )
