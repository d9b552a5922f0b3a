"""Settings of learning from preference pairs directly."""

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rlhf_core.config.base import Section, Share


class DPOConfig(Section):
    """Direct preference optimisation."""

    beta: PositiveFloat = Field(0.1, description="strength of the pull to the reference")
    nll_coef: NonNegativeFloat = Field(0.0, description="weight of the chosen response's token-level log-likelihood")
    epochs: PositiveInt = Field(1, description="passes over the preference pairs")
    prompts_per_step: PositiveInt = Field(
        16, description="prompt groups an optimiser step; a group's pairs stay together"
    )
    learning_rate: PositiveFloat = Field(2e-4, description="peak learning rate")
    warmup_steps: NonNegativeInt = Field(10, description="steps of linear warm-up")
    min_learning_rate_share: Share = Field(0.1, description="the linear decay ends at this share of the peak")
    max_grad_norm: PositiveFloat = Field(1.0, description="gradients are clipped to this norm")
    save_every: PositiveInt = Field(40, description="steps between checkpoints")
