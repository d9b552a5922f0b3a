"""Settings of the reward model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from rlhf_core.config.base import Correlation, Section, Share
from rlhf_core.config.watched import PLACEHOLDER

RewardLossName = Literal["bradley_terry", "margin", "hinge", "thurstone", "plackett_luce"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardLossRow:
    """What is known of a reward loss before it is computed, which `rlhf_core/trainers/reward/ranking_losses.py` does.

    Attributes:
        docs: its formula, for the reference page.
        has_variance: the model learns a variance of each score.
        of_rankings: it counts rankings and not pairs.
        models_ties: it knows a probability of ties (`ties: rao_kupper`).
    """

    docs: str
    has_variance: bool = False
    of_rankings: bool = False
    models_ties: bool = False


REWARD_LOSS_ROWS: Mapping[RewardLossName, RewardLossRow] = {
    "bradley_terry": RewardLossRow(docs="-log σ(Δ)", models_ties=True),
    "margin": RewardLossRow(docs="-log σ(Δ - m)"),
    "hinge": RewardLossRow(docs="max(0, m - Δ)"),
    "thurstone": RewardLossRow(docs="-log Φ(Δ / deviation) with a learned variance a response", has_variance=True),
    "plackett_luce": RewardLossRow(docs="the likelihood of the ranking that a prompt's pairs imply", of_rankings=True),
}


class RewardLossConfig(Section):
    """What the pairs of a prompt say of its responses' scores; Δ is the chosen less the rejected score."""

    name: RewardLossName = Field("bradley_terry", description="; ".join(row.docs for row in REWARD_LOSS_ROWS.values()))
    average: Literal["pair", "prompt"] = Field(
        "pair", description="pair: every pair counts the same; prompt: every prompt, its C(K,2) pairs 1 / C(K,2) each"
    )
    margin: PositiveFloat = Field(1.0, description="m of `margin` and `hinge`")
    margin_from: Literal["constant", "strength"] = Field(
        "constant", description="strength: m times the mean vote strength of the pair"
    )
    weights: Literal["none", "agreement", "strength", "difficulty"] = Field(
        "none",
        description="what a pair counts: share of agreeing votes; mean vote strength; how little of it the model has "
        "understood, 1 - σ(Δ)",
    )
    ties: Literal["half", "rao_kupper"] = Field(
        "half",
        description="pairs without a preference (preferences.keep_ties): half a win for each side, or the model of Rao "
        "and Kupper with `tie_threshold`",
    )
    center: Literal["scores", "pairs"] = Field(
        "scores", description="what `reward.centering` keeps near zero: every score, or the sum of a pair's two"
    )
    tie_threshold: PositiveFloat = Field(0.5, description="half width, in log-odds, of what people cannot tell apart")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        row = REWARD_LOSS_ROWS[self.name]
        if self.ties == "rao_kupper" and not row.models_ties:
            extended = " or ".join(repr(name) for name, other in REWARD_LOSS_ROWS.items() if other.models_ties)
            raise ValueError(f"ties 'rao_kupper' extends name {extended}, not {self.name!r}: set ties to half")
        if row.of_rankings and (self.average != "prompt" or self.weights != "none"):
            raise ValueError(
                f"name {self.name!r} counts rankings and not pairs: set average to prompt, weights to none"
            )
        return self


class RewardAuxiliaryConfig(Section):
    """Losses beside the ranking, each added with its weight; 0 leaves it out."""

    sft_coef: NonNegativeFloat = Field(0.0, description="negative log-likelihood of the chosen responses, a token")
    contrastive_coef: NonNegativeFloat = Field(
        0.0, description="supervised contrast of the mean states of chosen responses with those of rejected ones"
    )
    contrastive_temperature: PositiveFloat = Field(0.1, description="its temperature")


class RewardEnsembleConfig(Section):
    """Several reward models in place of one, and how much they disagree."""

    members: PositiveInt = Field(1, description="models, trained one after the other from seeds of their own")
    resample: Literal["bootstrap", "none"] = Field(
        "bootstrap", description="what a member is trained on: prompts drawn with replacement, or all of them"
    )
    aggregate: Literal["mean", "accuracy", "median", "vote", "pessimistic"] = Field(
        "mean",
        description="mean; mean weighted by the members' accuracy on prompts they did not draw; median; mean rank "
        "among training responses; mean less `pessimism` deviations",
    )
    pessimism: PositiveFloat = Field(1.0, description="deviations that `pessimistic` takes off")
    distill: Literal["none", "scores", "preferences"] = Field(
        "none",
        description="train one model on the members' aggregated scores, or on the preferences they are sure of, and "
        "publish that one",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.members == 1 and self.aggregate in ("accuracy", "median", "vote"):
            raise ValueError(f"aggregate {self.aggregate!r} speaks of several models: set members above 1")
        if self.members == 1 and self.distill != "none":
            raise ValueError("distill needs several models to learn from: set members above 1")
        if self.aggregate == "accuracy" and self.resample != "bootstrap":
            raise ValueError("aggregate 'accuracy' is measured on prompts left out: set resample to bootstrap")
        return self


class RewardConfig(Section):
    """Reward model, initialised from the SFT model, or from another reward model."""

    init: str = Field(
        PLACEHOLDER,
        min_length=1,
        description="folder of a reward model whose body and head training starts from, with the SFT model's "
        "vocabulary: a sequence classifier with one output (head last), or one of ours with the same head; DVC "
        "watches its content",
    )
    head: Literal["last", "mean", "attention", "mixed", "sum", "gated"] = Field(
        "last",
        description="scalar at the last token, its mean over the response, with learned attention, or a mixture of "
        "last and mean; its sum, or the log-probability-gated sum",
    )
    alpha: Share | None = Field(None, description="share of the last token for head mixed; null: learned, from 0.5")
    criteria: dict[str, PositiveFloat] = Field(
        {"overall": 1.0},
        min_length=1,
        description="what is scored, a head each, and its weight in the loss and in the score; `overall` are the "
        "labelled pairs, others come from graded responses",
    )
    epochs: PositiveInt = Field(2, description="passes over the preference pairs")
    prompts_per_step: PositiveInt = Field(
        12, description="prompt groups an optimiser step; a group's pairs stay together"
    )
    prompts_per_forward: PositiveInt | None = Field(
        None, description="prompt groups a forward pass, where memory is short; null: all of the step"
    )
    order: Literal["shuffled", "easy_first"] = Field(
        "shuffled", description="easy_first: the first pass goes from strong preferences to weak ones"
    )
    learning_rate: PositiveFloat = Field(1e-3, description="peak learning rate")
    warmup_steps: NonNegativeInt = Field(20, description="steps of linear warm-up")
    min_learning_rate_share: Share = Field(0.1, description="the linear decay ends at this share of the peak")
    weight_decay: NonNegativeFloat = Field(0.01, description="decoupled weight decay")
    max_grad_norm: PositiveFloat = Field(1.0, description="gradients are clipped to this norm")
    centering: NonNegativeFloat = Field(0.001, description="weight of the squared score, which keeps scores near zero")
    save_every: PositiveInt = Field(40, description="steps between checkpoints")
    min_pairwise_accuracy: Share = Field(0.5, description="gate: exit code 3 when its lower bound is below; 0: none")
    min_spearman: Correlation | None = Field(None, description="gate on the lower bound of Spearman's rho with grades")
    min_kendall: Correlation | None = Field(None, description="gate on the lower bound of Kendall's tau-b with grades")
    max_ece: Share | None = Field(None, description="gate on the upper bound of the expected calibration error")
    loss: RewardLossConfig = RewardLossConfig()
    auxiliary: RewardAuxiliaryConfig = RewardAuxiliaryConfig()
    ensemble: RewardEnsembleConfig = RewardEnsembleConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.init != PLACEHOLDER and self.auxiliary.sft_coef:
            raise ValueError("auxiliary.sft_coef needs a language model's output layer, which `init` has none of")
        if self.alpha is not None and self.head != "mixed":
            raise ValueError(f"alpha mixes last and mean, which head {self.head!r} does not: set head to mixed")
        ensemble = self.ensemble
        row = REWARD_LOSS_ROWS[self.loss.name]
        if ensemble.aggregate == "pessimistic" and ensemble.members == 1 and not row.has_variance:
            others = " or ".join(name for name, other in REWARD_LOSS_ROWS.items() if other.has_variance)
            raise ValueError(
                "ensemble.aggregate 'pessimistic' needs a deviation: set ensemble.members above 1, or loss.name to "
                f"{others}"
            )
        return self
