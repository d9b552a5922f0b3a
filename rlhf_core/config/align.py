"""Settings of the stage that aligns the policy."""

from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from rlhf_core.config.base import Section
from rlhf_core.config.ppo import PPOConfig
from rlhf_core.config.preference import DPOConfig
from rlhf_core.config.watched import PLACEHOLDER, check_folder, check_watched


class IPOConfig(DPOConfig):
    """A chain's link of identity preference optimisation."""

    loss: Literal["ipo", "ipo_sum"] = Field("ipo", description="averaged over tokens, or summed")


class SwitchConfig(Section):
    """When a link of a chain ends before its last step; measured on training prompts, between steps."""

    every: PositiveInt = Field(10, description="steps between measurements")
    prompts: PositiveInt = Field(64, description="training prompts of a measurement")
    max_kl: PositiveFloat | None = Field(
        None, description="nats a response by which the KL to SFT may grow within one link; null: no bound"
    )
    min_score_gain: PositiveFloat | None = Field(
        None,
        description="the reward model's mean score must rise by this from one measurement to the next; null: need not",
    )

    @property
    def measures(self) -> bool:
        """Whether there is anything to measure for."""
        return self.max_kl is not None or self.min_score_gain is not None


class ChainConfig(Section):
    """Algorithms one after the other, each from the policy before it; `align.chain: [dpo, ppo]` is short for links."""

    links: tuple[Literal["dpo", "ipo", "ppo"], ...] = Field((), strict=False, description="in this order")
    reference: Literal["sft", "previous"] = Field(
        "sft", description="what a link's divergence counts from: the SFT model, or the policy that the link began with"
    )
    switch: SwitchConfig = SwitchConfig()
    dpo: DPOConfig = DPOConfig()
    ipo: IPOConfig = IPOConfig()
    ppo: PPOConfig = PPOConfig()

    @model_validator(mode="before")
    @classmethod
    def _links_alone(cls, given: Any) -> Any:
        return {"links": given} if isinstance(given, list | tuple) else given


class AlignConfig(Section):
    """Which algorithms align the policy; each is a stage `align@<algorithm>`."""

    algorithms: tuple[Literal["ppo", "dpo", "chain"], ...] = Field(
        ("ppo", "dpo"), min_length=1, strict=False, description="each makes a policy of its own; all are compared"
    )
    models_folder: str = Field(
        PLACEHOLDER,
        description="the one folder that DVC watches for this stage: `ppo.reward_model`, and scorers of guards under "
        "models/, are it or lie under it. A run with --profile or --set finds it itself",
    )
    ppo: PPOConfig = PPOConfig()
    dpo: DPOConfig = DPOConfig()
    chain: ChainConfig = ChainConfig()

    @model_validator(mode="after")
    def _folders_are_watched(self) -> Self:
        folders = [ppo.reward_model for ppo in (self.ppo, self.chain.ppo) if ppo.reward_model]
        for folder in folders:
            check_folder(folder)
        check_watched(self.models_folder, folders, "align")
        return self

    @model_validator(mode="after")
    def _chain_has_links(self) -> Self:
        if "chain" in self.algorithms and len(self.chain.links) < 2:
            raise ValueError("algorithm 'chain' needs two links or more, such as chain: [dpo, ppo]")
        if len(set(self.algorithms)) < len(self.algorithms):
            raise ValueError("algorithms: one stands there twice; keep it once")
        return self
