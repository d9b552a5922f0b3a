"""Settings of the A/B evaluation and of the gates."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from rlhf_core.config.base import Correlation, Section, Share


class EvaluateConfig(Section):
    """A/B evaluation of each candidate against the SFT model on held-out prompts."""

    num_prompts: PositiveInt = Field(500, description="held-out prompts, taken from the end of the list")
    temperatures: tuple[NonNegativeFloat, ...] = Field(
        (1.0, 0.0), min_length=1, strict=False, description="each gives a comparison of its own; 0 is greedy"
    )
    judges: tuple[Literal["gold", "reward_model"], ...] = Field(
        ("gold", "reward_model"), min_length=1, strict=False, description="the first one decides the verdict"
    )
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = Field(0.95, description="level of every interval")
    num_samples: PositiveInt = Field(20, description="rows of the side-by-side table")


class GatesConfig(Section):
    """What a version must show before it may become champion. An undefined metric never passes."""

    min_win_rate_low: Share = Field(0.5, description="policy: lower bound of the win rate against SFT")
    min_win_rate_low_champion: Share = Field(
        0.5, description="policy: the same against the champion, where there is one"
    )
    max_kl_to_sft: PositiveFloat = Field(10.0, description="policy: nats a response")
    max_heldout_loss: PositiveFloat | None = Field(
        5.0, description="SFT: held-out loss, nats a token; null where no demonstrations are held out"
    )
    min_finished_share: Share | None = Field(
        0.5,
        description="SFT: share of evaluation replies, first temperature, that it ended within the limit; null: any",
    )
    min_pairwise_accuracy: Share = Field(0.5, description="reward model: held-out pairwise accuracy")
    min_spearman: Correlation | None = Field(
        None, description="reward model: rank correlation with graded responses; null where there are none"
    )
    max_ece: Share | None = Field(None, description="reward model: expected calibration error; null: any")
