"""Settings of the stage that aligns the policy."""

from typing import Literal

from pydantic import Field

from rlhf_core.config.base import Section
from rlhf_core.config.ppo import PPOConfig
from rlhf_core.config.preference import DPOConfig


class AlignConfig(Section):
    """Which algorithms align the policy; each is a stage `align@<algorithm>`."""

    algorithms: tuple[Literal["ppo", "dpo"], ...] = Field(("ppo", "dpo"), min_length=1, strict=False)
    ppo: PPOConfig = PPOConfig()
    dpo: DPOConfig = DPOConfig()
