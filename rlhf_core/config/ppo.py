"""Settings of PPO."""

from typing import Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rlhf_core.config.base import Section, Share


class PPOConfig(Section):
    """Proximal policy optimisation against the frozen reward model."""

    steps: PositiveInt = Field(24, description="rollout batches")
    rollout_batch: PositiveInt = Field(64, description="prompts a rollout")
    minibatch: PositiveInt = Field(32, description="rows a gradient step")
    epochs: PositiveInt = Field(2, description="passes over a rollout")
    temperature: PositiveFloat = Field(1.0, description="of sampling and of every log-probability")
    learning_rate: PositiveFloat = Field(4e-4, description="of the policy")
    value_learning_rate: PositiveFloat = Field(1e-3, description="of the value model")
    warmup_steps: NonNegativeInt = Field(5, description="rollouts of linear warm-up")
    min_learning_rate_share: Share = Field(0.3, description="the linear decay ends at this share of the peak")
    clip_eps: PositiveFloat = Field(0.2, description="ratio clipping")
    value_clip_eps: PositiveFloat = Field(0.4, description="value clipping around the rollout's values")
    gamma: Share = Field(1.0, description="discount")
    gae_lambda: Share = Field(0.95, description="bias against variance of the advantages")
    kl_coef: NonNegativeFloat = Field(0.2, description="price of one nat of divergence from the SFT model, each token")
    target_kl: PositiveFloat = Field(
        0.2, description="a rollout's epochs stop when a minibatch moved further than this"
    )
    score_clip: PositiveFloat = Field(5.0, description="scores are clipped to plus or minus this")
    missing_end_penalty: NonNegativeFloat = Field(1.0, description="taken off the score of a response that never ends")
    max_grad_norm: PositiveFloat = Field(1.0, description="gradients are clipped to this norm")
    save_every: PositiveInt = Field(5, description="rollouts between checkpoints")

    @model_validator(mode="after")
    def _minibatch_divides(self) -> Self:
        if self.rollout_batch % self.minibatch:
            raise ValueError(f"minibatch {self.minibatch} must divide rollout_batch {self.rollout_batch}")
        return self
