"""Settings of the stage that combines two aligned policies."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from rlhf_core.config.base import OpenShare, Section


class CombineConfig(Section):
    """Two aligned policies made into one; each method is a stage `combine@<method>` and a policy like the others."""

    methods: tuple[Literal["weights", "probabilities"], ...] = Field(
        (),
        strict=False,
        description="weights: averaged, one model; probabilities: mixed at every token, both models kept",
    )
    members: tuple[Literal["ppo", "dpo", "chain"], ...] = Field(
        ("ppo", "dpo"), min_length=2, max_length=2, strict=False, description="two of align.algorithms"
    )
    shares: tuple[Annotated[OpenShare, Field(gt=0.0)], ...] = Field(
        (0.25, 0.5, 0.75), min_length=1, strict=False, description="of the second member, among which one is chosen"
    )
    choose_by: Literal["likelihood", "score"] = Field(
        "likelihood",
        description="on held-out pairs: log-likelihood of the chosen responses a token, or score less kl_coef times KL",
    )
    kl_coef: NonNegativeFloat = Field(0.1, description="price of a nat of KL to SFT a response (choose_by: score)")
    pairs: PositiveInt = Field(256, description="held-out preference pairs that the choice reads, or their prompts")

    @model_validator(mode="after")
    def _two_members(self) -> Self:
        if self.members[0] == self.members[1]:
            raise ValueError("members: two different ones")
        return self
