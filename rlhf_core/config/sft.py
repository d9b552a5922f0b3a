"""Settings of supervised fine-tuning."""

from typing import Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rlhf_core.config.base import OpenShare, Section, Share


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
    heldout_share: OpenShare = Field(0.03, description="share of demonstrations kept for the held-out loss")
    eval_every: PositiveInt = Field(100, description="steps between held-out losses")
    patience: PositiveInt = Field(3, description="held-out losses without a new best before training stops")
    save_every: PositiveInt = Field(100, description="steps between checkpoints")

    @model_validator(mode="after")
    def _splits(self) -> Self:
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation {self.accumulation} must divide batch_size {self.batch_size}")
        return self
