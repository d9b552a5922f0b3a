"""Settings of PPO and of what runs in the same loop: REINFORCE, RLOO, GRPO."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from rlhf_core.config.base import Section, Share

CALLABLE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
"""`package.module:function`."""
BUILT_IN_TERMS = ("length", "diversity")
AdvantageMethod = Literal["gae", "reinforce", "rloo", "grpo"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdvantageRow:
    """What is known of a way to credit responses; how it is computed stands in `rlhf_core/trainers/ppo/credit.py`.

    Attributes:
        docs: what it compares with, for the reference page.
        compares: the same in one word: values of a value model, or other responses of the rollout or to the prompt.
    """

    docs: str
    compares: Literal["values", "rollout", "prompt"]


ADVANTAGE_ROWS: Mapping[AdvantageMethod, AdvantageRow] = {
    "gae": AdvantageRow(docs="the value model", compares="values"),
    "reinforce": AdvantageRow(docs="the rollout's other responses", compares="rollout"),
    "rloo": AdvantageRow(docs="those to the same prompt", compares="prompt"),
    "grpo": AdvantageRow(docs="those to the same prompt in units of their deviation", compares="prompt"),
}


class AdvantageConfig(Section):
    """How much better a token did than was to be expected."""

    method: AdvantageMethod = Field(
        "gae", description="against " + ", ".join(f"{row.docs} ({name})" for name, row in ADVANTAGE_ROWS.items())
    )
    scaling: Literal["whiten", "none"] = Field(
        "whiten", description="mean 0 and variance 1 over all response tokens of the rollout, or as they are"
    )
    truncated: Literal["terminal", "bootstrap"] = Field(
        "terminal",
        description="what lies beyond the end of a response that the length limit cut: nothing, the penalty being its "
        "price, or what the value model says of its last state (method: gae)",
    )


class ValueConfig(Section):
    """The value model, which method gae alone has."""

    model: Literal["separate", "shared"] = Field(
        "separate", description="a network of its own from the reward model, or a head on the policy's own states"
    )
    coef: PositiveFloat = Field(0.1, description="weight of the value loss in the common loss (model: shared)")


class KLConfig(Section):
    """How divergence from the SFT model is measured and priced."""

    estimator: Literal["k1", "k2", "k3"] = Field(
        "k1", description="what each token pays for; k1 and k3 are unbiased, k2 is not"
    )
    k3_cap: PositiveFloat | None = Field(
        None, description="most that k3 of one token may be, charged or reported: less variance, and too low a mean"
    )
    controller: Literal["fixed", "adaptive"] = Field("fixed", description="whether kl_coef follows the measured KL")
    target: PositiveFloat = Field(6.0, description="nats a response that the adaptive controller steers to")
    horizon: PositiveFloat = Field(10_000.0, description="responses over which it corrects an error; less is faster")


class ScoresConfig(Section):
    """What is done to the reward model's scores before they are learned from, and what is added to them."""

    normalise: Literal["none", "running", "quantile"] = Field(
        "none", description="running: standard scores among all so far; quantile: two quantiles become -1 and 1"
    )
    quantiles: tuple[Share, Share] = Field(
        (0.1, 0.9), strict=False, description="the two shares of recent scores (normalise: quantile)"
    )
    window: PositiveInt = Field(1024, description="how many recent scores these are taken from (normalise: quantile)")
    terms: dict[str, float] = Field(
        {}, description="further rewards and their weights: `length`, `diversity`, or `package.module:function`"
    )

    @model_validator(mode="after")
    def _quantiles_rise(self) -> Self:
        low, high = self.quantiles
        if low >= high:
            raise ValueError(f"quantiles {low} and {high} must rise")
        return self

    @field_validator("terms")
    @classmethod
    def _known(cls, terms: dict[str, float]) -> dict[str, float]:
        for name in terms:
            if name not in BUILT_IN_TERMS and not CALLABLE.fullmatch(name):
                raise ValueError(f"no term {name!r}; {', '.join(BUILT_IN_TERMS)} or package.module:function")
        return terms


class ReplayConfig(Section):
    """Old responses that are learned from again (0 rows: none)."""

    rows: NonNegativeInt = Field(0, description="replayed responses a rollout, beside the fresh ones")
    capacity: PositiveInt = Field(512, description="responses kept; the oldest go first")
    priority: NonNegativeFloat = Field(0.6, description="drawn by |advantage| to this power; 0 draws evenly")
    correction: Share = Field(0.4, description="how much of the uneven drawing the weights take back")
    max_weight: PositiveFloat = Field(2.0, description="importance weights of a token are cut here")


class CurriculumConfig(Section):
    """Easy prompts first: only this share of them, those with the best mean scores, growing to all."""

    start_share: float = Field(1.0, gt=0.0, le=1.0, description="share of the prompts at the first rollout; 1: all")
    steps: PositiveInt = Field(20, description="rollouts until all prompts take part")


class GuardConfig(Section):
    """Ends a run that earns more from the reward model and less from a scorer that it is not trained on."""

    every: NonNegativeInt = Field(0, description="rollouts between readings; 0: no guard")
    scorer: str | None = Field(None, description="folder of another reward model, or `package.module:function`")
    prompts: PositiveInt = Field(64, description="held-out prompts of a reading")
    max_drop: NonNegativeFloat = Field(0.1, description="how far the held-out score may lie below its best reading")
    max_kl: PositiveFloat = Field(30.0, description="nats a response from the SFT model that end the run at once")
    patience: PositiveInt = Field(2, description="bad readings in a row that end the run")

    @model_validator(mode="after")
    def _has_a_scorer(self) -> Self:
        if self.every and not self.scorer:
            raise ValueError("a guard needs `scorer`, a folder with a reward model or package.module:function")
        return self


class PPOConfig(Section):
    """Proximal policy optimisation against the frozen reward model."""

    reward_model: str | None = Field(
        None,
        description="folder under models/ with a reward model from elsewhere to learn from in the place of the run's "
        "own: a sequence classifier with one output, which reads texts",
    )
    steps: PositiveInt = Field(24, description="rollout batches")
    rollout_batch: PositiveInt = Field(64, description="responses a rollout")
    responses_per_prompt: PositiveInt = Field(1, description="responses to each prompt of a rollout")
    minibatch: PositiveInt = Field(32, description="responses a gradient step")
    microbatch: PositiveInt | None = Field(None, description="responses a forward pass; null: the whole minibatch")
    epochs: PositiveInt = Field(2, description="passes over a rollout")
    temperature: PositiveFloat = Field(1.0, description="of sampling and of every log-probability")
    learning_rate: PositiveFloat = Field(4e-4, description="of the policy")
    value_learning_rate: PositiveFloat = Field(1e-3, description="of the value model")
    adam_eps: PositiveFloat = Field(1e-8, description="Adam's epsilon; 1e-5 takes the edge off the first steps")
    warmup_steps: NonNegativeInt = Field(5, description="rollouts of linear warm-up")
    min_learning_rate_share: Share = Field(0.3, description="the linear decay ends at this share of the peak")
    clip_eps: PositiveFloat = Field(0.2, description="ratio clipping")
    value_clip_eps: PositiveFloat = Field(0.4, description="value clipping around the rollout's values")
    entropy_coef: NonNegativeFloat = Field(0.0, description="reward for each nat of the policy's mean entropy a token")
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
    advantages: AdvantageConfig = AdvantageConfig()
    value: ValueConfig = ValueConfig()
    kl: KLConfig = KLConfig()
    scores: ScoresConfig = ScoresConfig()
    replay: ReplayConfig = ReplayConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    guard: GuardConfig = GuardConfig()

    @property
    def has_value_model(self) -> bool:
        """Whether the method learns values."""
        return ADVANTAGE_ROWS[self.advantages.method].compares == "values"

    @model_validator(mode="after")
    def _minibatch_divides(self) -> Self:
        if self.rollout_batch % self.minibatch:
            raise ValueError(f"minibatch {self.minibatch} must divide rollout_batch {self.rollout_batch}")
        return self

    @model_validator(mode="after")
    def _groups_are_whole(self) -> Self:
        group, method = self.responses_per_prompt, self.advantages.method
        compares = ADVANTAGE_ROWS[method].compares
        if self.rollout_batch % group:
            raise ValueError(f"responses_per_prompt {group} must divide rollout_batch {self.rollout_batch}")
        if compares == "prompt" and group < 2:
            raise ValueError(
                f"advantages.method {method!r} compares responses to one prompt: responses_per_prompt >= 2"
            )
        if compares == "rollout" and self.rollout_batch < 2:
            raise ValueError(f"advantages.method {method!r} compares responses of a rollout: rollout_batch >= 2")
        if not self.has_value_model and self.value.model == "shared":
            raise ValueError(f"advantages.method {method!r} has no value model: leave value.model out")
        if not self.has_value_model and self.advantages.truncated == "bootstrap":
            raise ValueError(f"advantages.method {method!r} has no values: leave advantages.truncated out")
        return self

    @model_validator(mode="after")
    def _price_can_move(self) -> Self:
        if self.kl.controller == "adaptive" and not self.kl_coef:
            raise ValueError("kl.controller 'adaptive' multiplies kl_coef, and 0 stays 0: start from a kl_coef above 0")
        return self

    @model_validator(mode="after")
    def _replay_fits(self) -> Self:
        rows, capacity = self.replay.rows, self.replay.capacity
        if rows % self.minibatch or rows % self.responses_per_prompt:
            raise ValueError(
                f"replay.rows {rows} must be a multiple of minibatch {self.minibatch} "
                f"and of responses_per_prompt {self.responses_per_prompt}"
            )
        if rows > capacity:
            raise ValueError(f"replay.rows {rows} is more than replay.capacity {capacity} holds")
        return self
