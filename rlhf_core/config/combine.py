"""Settings of the stage that combines aligned policies."""

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from rlhf_core.config.base import Section


class CombineConfig(Section):
    """Aligned policies made into one; each method is a stage `combine@<method>` and a policy like the others."""

    methods: tuple[Literal["weights", "probabilities"], ...] = Field(
        (),
        strict=False,
        description="weights: averaged, one model; probabilities: mixed at every token, all models kept",
    )
    members: tuple[Literal["ppo", "dpo", "chain"], ...] = Field(
        ("ppo", "dpo"), min_length=2, strict=False, description="two or more of align.algorithms"
    )
    parts: PositiveInt = Field(
        4,
        le=20,
        description="each member gets one or more of so many equal parts, and all ways to deal them are tried: with 4, "
        "shares of 0.25, 0.5, 0.75 for two members; with 6, ten for three, the even one among them",
    )
    choose_by: Literal["likelihood", "score"] = Field(
        "likelihood",
        description="on held-out pairs: log-likelihood of the chosen responses a token, or score less kl_coef times KL",
    )
    kl_coef: NonNegativeFloat = Field(0.1, description="price of a nat of KL to SFT a response (choose_by: score)")
    pairs: PositiveInt = Field(256, description="held-out preference pairs that the choice reads, or their prompts")

    @model_validator(mode="before")
    @classmethod
    def _shares_became_parts(cls, given: Any) -> Any:
        if isinstance(given, dict) and "shares" in given:
            raise ValueError("`shares` became `parts`, for any number of members; parts: 4 is [0.25, 0.5, 0.75] of two")
        return given

    @model_validator(mode="after")
    def _members_differ(self) -> Self:
        if len(set(self.members)) < len(self.members):
            raise ValueError("members: one stands there twice; keep it once")
        if self.parts < len(self.members):
            raise ValueError(f"parts {self.parts} of {len(self.members)} members: one part at least for each")
        return self
