"""Settings of learning from preference pairs directly: DPO and its relatives."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rlhf_core.config.base import Section, Share

PreferenceLoss = Literal["sigmoid", "ipo", "ipo_sum", "conservative", "robust", "hinge", "kto", "orpo", "simpo"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LossRow:
    """What is known of a loss on pairs before it is computed, which `rlhf_core/objectives/preference.py` does.

    Attributes:
        docs: when to take it, one line for the reference page.
        options: the `PreferenceOptions` that it reads; another loss with one of these set is refused.
        needs_likelihood: it is an addition to supervised fine-tuning and refused without `nll_coef`.
    """

    docs: str
    options: tuple[str, ...] = ()
    needs_likelihood: bool = False


LOSS_ROWS: Mapping[PreferenceLoss, LossRow] = {
    "sigmoid": LossRow(docs="DPO itself, the default: labels are mostly right"),
    "ipo": LossRow(docs="IPO over token means: few or near-deterministic pairs; lengths differ"),
    "ipo_sum": LossRow(docs="IPO as in the paper: responses of like length"),
    "conservative": LossRow(docs="cDPO: some labels are wrong", options=("label_smoothing",)),
    "robust": LossRow(docs="robust DPO: a known share of labels is flipped", options=("label_smoothing",)),
    "hinge": LossRow(docs="SLiC's: pairs that are settled shall stop pulling"),
    "kto": LossRow(
        docs="KTO: each response is good or bad by itself", options=("desirable_weight", "undesirable_weight")
    ),
    "orpo": LossRow(docs="ORPO: no reference is affordable; starts from a base model", needs_likelihood=True),
    "simpo": LossRow(docs="SimPO: no reference, and length must not be rewarded", options=("simpo_margin",)),
}


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
        row = LOSS_ROWS[self.loss]
        for name in PreferenceOptions.model_fields:
            if getattr(self.options, name) is not None and name not in row.options:
                losses = " and ".join(loss for loss, other in LOSS_ROWS.items() if name in other.options)
                raise ValueError(f"options.{name} is read by loss {losses} only, not by {self.loss!r}: leave it out")
        if row.needs_likelihood and not self.nll_coef:
            raise ValueError(
                f"loss {self.loss!r} is an addition to supervised fine-tuning: set nll_coef, 1.0 in the paper"
            )
        return self
