"""Settings of learning from preference pairs directly: DPO and its relatives."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rlhf_core.config.base import Section, Share

PreferenceLoss = Literal["sigmoid", "ipo", "ipo_sum", "conservative", "robust", "hinge", "kto", "orpo", "simpo"]
REFERENCE_FREE = ("orpo", "simpo")
"""Losses that ask no reference policy."""

READ_BY = {
    "label_smoothing": ("conservative", "robust"),
    "simpo_margin": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}
"""The losses that read an option; any other with that option set is refused."""


class PreferenceOptions(Section):
    """Settings that only some losses read; null is the default given in the meaning."""

    label_smoothing: Annotated[float, Field(gt=0.0, lt=0.5)] | None = Field(
        None, description="share of the labels taken to be flipped (conservative, robust); null: 0.1"
    )
    simpo_margin: NonNegativeFloat | None = Field(
        None, description="gamma, by which a chosen response's reward is to lead (simpo); null: half of beta"
    )
    desirable_weight: PositiveFloat | None = Field(None, description="of chosen responses (kto); null: 1")
    undesirable_weight: PositiveFloat | None = Field(None, description="of rejected responses (kto); null: 1")


class DPOConfig(Section):
    """Direct preference optimisation."""

    loss: PreferenceLoss = Field("sigmoid", description="see docs/trainers/preference.md for which loss when")
    beta: PositiveFloat = Field(
        0.1, description="strength of the pull to the reference; scale of the reward (simpo), weight of the odds (orpo)"
    )
    nll_coef: NonNegativeFloat = Field(
        0.0, description="weight of the chosen response's token-level log-likelihood; orpo needs one, the paper's is 1"
    )
    pair_weights: Literal["none", "agreement", "strength"] = Field(
        "none", description="a pair counts by the share of votes for its label, or by their mean signed strength"
    )
    options: PreferenceOptions = PreferenceOptions()
    epochs: PositiveInt = Field(1, description="passes over the preference pairs")
    prompts_per_step: PositiveInt = Field(
        16, description="prompt groups an optimiser step; a group's pairs stay together"
    )
    prompts_per_forward: PositiveInt | None = Field(
        None, description="prompt groups a forward pass, where memory is short; null: all of the step"
    )
    learning_rate: PositiveFloat = Field(2e-4, description="peak learning rate")
    warmup_steps: NonNegativeInt = Field(10, description="steps of linear warm-up")
    min_learning_rate_share: Share = Field(0.1, description="the linear decay ends at this share of the peak")
    max_grad_norm: PositiveFloat = Field(1.0, description="gradients are clipped to this norm")
    save_every: PositiveInt = Field(40, description="steps between checkpoints")

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference policy."""
        return self.loss not in REFERENCE_FREE

    @property
    def label_smoothing(self) -> float:
        """Share of the labels taken to be flipped."""
        return 0.1 if self.options.label_smoothing is None else self.options.label_smoothing

    @property
    def simpo_margin(self) -> float:
        """SimPO's gamma; half of beta is the ratio that its authors found best on most models."""
        return 0.5 * self.beta if self.options.simpo_margin is None else self.options.simpo_margin

    @property
    def desirable_weight(self) -> float:
        """KTO's weight of chosen responses."""
        return 1.0 if self.options.desirable_weight is None else self.options.desirable_weight

    @property
    def undesirable_weight(self) -> float:
        """KTO's weight of rejected responses."""
        return 1.0 if self.options.undesirable_weight is None else self.options.undesirable_weight

    @model_validator(mode="after")
    def _options_belong_to_the_loss(self) -> Self:
        for name, losses in READ_BY.items():
            if getattr(self.options, name) is not None and self.loss not in losses:
                raise ValueError(
                    f"options.{name} is read by loss {' and '.join(losses)} only, not by {self.loss!r}: leave it out"
                )
        if self.loss == "orpo" and not self.nll_coef:
            raise ValueError("loss 'orpo' is an addition to supervised fine-tuning: set nll_coef, 1.0 in the paper")
        return self
