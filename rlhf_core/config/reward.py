"""Settings of the reward model."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rlhf_core.config.base import Correlation, Section, Share


class RewardConfig(Section):
    """Bradley-Terry reward model, initialised from the SFT model."""

    head: Literal["last", "mean", "sum", "gated"] = Field(
        "last", description="scalar at the last token, its mean or sum, or the log-probability-gated sum"
    )
    epochs: PositiveInt = Field(2, description="passes over the preference pairs")
    prompts_per_step: PositiveInt = Field(
        12, description="prompt groups an optimiser step; a group's pairs stay together"
    )
    learning_rate: PositiveFloat = Field(1e-3, description="peak learning rate")
    warmup_steps: NonNegativeInt = Field(20, description="steps of linear warm-up")
    min_learning_rate_share: Share = Field(0.1, description="the linear decay ends at this share of the peak")
    weight_decay: NonNegativeFloat = Field(0.01, description="decoupled weight decay")
    max_grad_norm: PositiveFloat = Field(1.0, description="gradients are clipped to this norm")
    centering: NonNegativeFloat = Field(0.001, description="weight of the squared score, which keeps scores near zero")
    save_every: PositiveInt = Field(40, description="steps between checkpoints")
    min_pairwise_accuracy: Share = Field(0.5, description="gate: the stage fails with exit code 3 below this")
    min_spearman: Correlation | None = Field(None, description="gate on the rank correlation with graded responses")
    min_kendall: Correlation | None = Field(None, description="gate on Kendall's tau-b with graded responses")
    max_ece: Share | None = Field(None, description="gate on the expected calibration error")
