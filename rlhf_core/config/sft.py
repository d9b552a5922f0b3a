"""Settings of supervised fine-tuning."""

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rlhf_core.config.base import OpenShare, Section, Share


class SFTBatchesConfig(Section):
    """Which demonstrations share an optimiser step."""

    by: Literal["examples", "tokens"] = Field(
        "examples", description="a step takes `batch_size` demonstrations, or as many as have `tokens` tokens"
    )
    tokens: PositiveInt = Field(4096, description="tokens an optimiser step, prompts included (by: tokens)")
    balance: Literal["none", "task"] = Field(
        "none", description="none: every demonstration once a pass; task: every type of task as often as another"
    )


class HardExamplesConfig(Section):
    """Demonstrations with a higher loss weigh more, by the loss each had when it was last seen."""

    exponent: PositiveFloat = Field(1.0, description="weight = (running loss / mean running loss) ** exponent")
    max_weight: float = Field(4.0, ge=1.0, description="weights stay between 1 / this and this")
    memory: OpenShare = Field(0.5, description="share of the running loss that a new loss leaves; 0: the last loss")


class SFTConfig(Section):
    """Supervised fine-tuning on responses only."""

    max_steps: PositiveInt = Field(550, description="optimiser steps")
    batch_size: PositiveInt = Field(32, description="demonstrations an optimiser step")
    accumulation: PositiveInt = Field(1, description="micro-batches an optimiser step is split into")
    learning_rate: PositiveFloat = Field(3e-3, description="peak learning rate")
    warmup_steps: NonNegativeInt = Field(20, description="steps of linear warm-up before the cosine")
    min_learning_rate_share: Share = Field(0.1, description="the cosine ends at this share of the peak")
    weight_decay: NonNegativeFloat = Field(0.01, description="decoupled weight decay")
    max_grad_norm: PositiveFloat = Field(1.0, description="gradients are clipped to this norm")
    max_grad_value: PositiveFloat | None = Field(
        None, description="each entry of a gradient is cut to this size after the norm; null: not cut"
    )
    heldout_share: OpenShare = Field(0.03, description="share of demonstrations kept for the held-out loss")
    eval_every: PositiveInt = Field(100, description="steps between held-out losses")
    patience: PositiveInt = Field(3, description="held-out losses without a new best before training stops")
    save_every: PositiveInt = Field(100, description="steps between checkpoints")
    turns: Literal["all", "last"] = Field("all", description="replies of a dialogue that are learned")
    batches: SFTBatchesConfig = SFTBatchesConfig()
    hard_examples: HardExamplesConfig | None = Field(None, description="weigh by loss; null: all weigh the same")

    @model_validator(mode="after")
    def _splits(self) -> Self:
        if self.batches.by == "examples" and self.batch_size % self.accumulation:
            raise ValueError(f"accumulation {self.accumulation} must divide batch_size {self.batch_size}")
        return self
