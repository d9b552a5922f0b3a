"""Settings of the stages that make data: validate, generate, label, preferences."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rlhf_core.config.base import OpenShare, Section, Share


class DataConfig(Section):
    """Which file holds which record kind, relative to the project, and how held-out prompts are set apart."""

    demonstrations: str | None = Field(None, description="(prompt, response) rows or `messages`")
    prompts: str | None = Field(None, description="prompts that responses are sampled for")
    heldout_prompts: str | None = Field(None, description="prompts that no training stage may see")
    graded: str | None = Field(None, description="(prompt, response, score) rows for rank correlation")
    votes: str | None = Field(None, description="(prompt, response_a, response_b, annotator, choice) rows")
    comparisons: str | None = Field(None, description="(prompt, chosen, rejected) rows or two whole transcripts")
    heldout_share: OpenShare = Field(
        0.0, description="share of prompt groups held out by stable hash, beside those in `heldout_prompts`"
    )


class ValidateConfig(Section):
    """What counts as a bad row, and how many of them stop the pipeline."""

    max_bad_share: Share = Field(0.01, description="a record kind with a larger share of bad rows stops the pipeline")
    max_prompt_chars: PositiveInt = Field(20_000, description="longer prompts are bad rows")
    max_response_chars: PositiveInt = Field(20_000, description="longer responses are bad rows")
    score_range: tuple[float, float] | None = Field(
        None, strict=False, description="[lowest, highest] score of a graded response; null: any finite number"
    )
    criteria: tuple[str, ...] = Field(
        ("overall",),
        min_length=1,
        strict=False,
        description="criteria that graded responses may name; rows without one are `overall`",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.score_range and self.score_range[0] >= self.score_range[1]:
            raise ValueError(f"score_range {list(self.score_range)} must have the lowest score first")
        return self


class GenerateConfig(Section):
    """Responses sampled from the SFT model, to be labelled."""

    num_prompts: NonNegativeInt = Field(700, description="training prompts that get responses; 0 samples nothing")
    num_heldout_prompts: NonNegativeInt = Field(400, description="held-out prompts that get responses")
    responses_per_prompt: PositiveInt = Field(4, description="responses each prompt gets")
    temperatures: tuple[PositiveFloat, ...] = Field(
        (1.0,), min_length=1, strict=False, description="used in turn over the responses of a prompt"
    )
    batch_size: PositiveInt = Field(256, description="rows sampled at once")


class LabelConfig(Section):
    """Who says which response is better."""

    source: Literal["file", "simulated"] = Field(
        "simulated", description="file: votes or comparisons from `data`; simulated: the demo's annotators"
    )
    min_votes: PositiveInt = Field(1, description="pairs with fewer votes are left out")


class PreferencesConfig(Section):
    """From labelled pairs to a clean, balanced, split preference data set."""

    duplicate_threshold: Annotated[float, Field(ge=0.5, le=1.0)] = Field(
        0.9, description="Jaccard similarity of word triples at or above which two pairs are the same"
    )
    leakage_threshold: Annotated[float, Field(ge=0.5, le=1.0)] = Field(
        0.95, description="the same at or above which a training prompt counts as a held-out one"
    )
    max_pairs_per_prompt: PositiveInt = Field(6, description="more pairs than this are thinned, strongest kept")
    balance_task: bool = Field(False, description="thin task types to at most `balance_ratio` times the rarest")
    balance_length: bool = Field(False, description="thin pairs until the longer response wins as often as it loses")
    balance_ratio: Annotated[float, Field(ge=1.0)] = Field(4.0, description="see `balance_task`")
    min_margin: NonNegativeFloat = Field(0.0, description="pairs with a smaller mean vote strength are left out")
    keep_ties: bool = Field(False, description="hand pairs without a preference on too; the reward model reads them")
    min_grade_gap: NonNegativeFloat = Field(
        0.0, description="grades on a criterion that are no further apart prefer nothing"
    )
