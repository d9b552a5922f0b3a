"""Settings of low-rank adapters."""

from typing import Literal

from pydantic import Field, PositiveInt

from rlhf_core.config.base import Section

AdaptedStage = Literal["sft", "reward", "align"]


class LoraConfig(Section):
    """Train small low-rank matrices beside frozen weights, in place of the weights themselves."""

    rank: PositiveInt = Field(16, description="rank of each adapter; what it can change grows with it, and its cost")
    alpha: PositiveInt = Field(
        32, description="an adapter's output is scaled by alpha / rank; by alpha / sqrt(rank) with `use_rslora`"
    )
    use_rslora: bool = Field(
        False, description="scale by alpha / sqrt(rank), so that large ranks learn as fast as small ones (rsLoRA)"
    )
    use_dora: bool = Field(
        False,
        description="learn the length of each row of the weight by itself, the low-rank matrices its direction (DoRA); "
        "each step costs more",
    )
    targets: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        strict=False,
        description="names of the linear layers that get one, such as q_proj; null: all of attention and MLP",
    )
    stages: tuple[AdaptedStage, ...] = Field(
        ("sft", "reward", "align"), min_length=1, strict=False, description="stages that train adapters"
    )
