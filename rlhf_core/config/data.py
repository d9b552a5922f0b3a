"""Settings of the stages that make data: validate, generate, label, preferences."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rlhf_core.config.base import OpenShare, Section, Share
from rlhf_core.config.watched import PLACEHOLDER, check_folder, check_watched


class DataConfig(Section):
    """Which file holds which record kind, relative to the project, and how held-out prompts are set apart."""

    demonstrations: str | None = Field(None, description="(prompt, response) rows or `messages`")
    prompts: str | None = Field(None, description="prompts that responses are sampled for")
    heldout_prompts: str | None = Field(None, description="prompts that no training stage may see")
    graded: str | None = Field(
        None, description="(prompt, response, score) rows: rank correlation, and labels where no file has others"
    )
    votes: str | None = Field(None, description="(prompt, response_a, response_b, annotator, choice) rows")
    comparisons: str | None = Field(None, description="(prompt, chosen, rejected) rows or two whole transcripts")
    rankings: str | None = Field(
        None, description="(prompt, responses, ranking) rows; a rank for each response, 1 is best, equal ranks tie"
    )
    heldout_share: OpenShare | None = Field(
        None,
        description="share of dialogues held out by stable hash, beside those in `heldout_prompts`; null: 0.1 "
        "where no file names held-out prompts, else 0",
    )
    split_by: str | None = Field(
        None, description="column whose values are held out as a whole (source, user, debate); null: dialogues are"
    )

    @property
    def hashed_share(self) -> float:
        """The share of prompt groups held out by hash, set or not."""
        if self.heldout_share is not None:
            return self.heldout_share
        return 0.0 if self.heldout_prompts else 0.1


class ValidateConfig(Section):
    """What counts as a bad row, and how many of them stop the pipeline."""

    max_bad_share: Share = Field(0.01, description="a record kind with a larger share of bad rows stops the pipeline")
    max_prompt_chars: PositiveInt = Field(20_000, description="longer prompts are bad rows")
    max_response_chars: PositiveInt = Field(20_000, description="longer responses are bad rows")
    keep_empty_responses: bool = Field(
        False,
        description="an empty reply that people judged (in graded, votes, comparisons, rankings) is a reply; false: a "
        "bad row. Demonstrations are never empty",
    )
    score_range: tuple[float, float] | None = Field(
        None, strict=False, description="[lowest, highest] score of a graded response; null: any finite number"
    )
    criteria: tuple[str, ...] = Field(
        ("overall",),
        min_length=1,
        strict=False,
        description="criteria that grades, votes, comparisons and rankings may name; rows without one are `overall`",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.score_range and self.score_range[0] >= self.score_range[1]:
            raise ValueError(f"score_range {list(self.score_range)} must have the lowest score first")
        return self


class BestOfConfig(Section):
    """Several candidates sampled for each response, of which a scorer keeps the best, or the best and the worst."""

    candidates: PositiveInt = Field(1, description="samples that the scorer picks from; 1 keeps what is sampled")
    keep: Literal["best", "contrast"] = Field(
        "best",
        description="best: the best of its candidates is a response; contrast: best and worst of the same candidates "
        "are two, for pairs that differ",
    )
    scorer: Literal["likelihood", "reward_model"] = Field(
        "likelihood",
        description="likelihood: mean log-probability a token under the SFT model; reward_model: the one named below",
    )
    reward_model: str | None = Field(
        None, description="folder under models/ with a reward model of an earlier round (scorer: reward_model)"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.keep == "contrast" and self.candidates < 2:
            raise ValueError("keep 'contrast' needs candidates of at least 2: the best of one is its worst too")
        if self.scorer == "reward_model" and not self.reward_model:
            raise ValueError("scorer 'reward_model' needs `reward_model`, a folder under models/")
        if self.reward_model:
            check_folder(self.reward_model)
        return self


class GenerateConfig(Section):
    """Responses sampled from the SFT model and others, to be labelled."""

    num_prompts: NonNegativeInt = Field(700, description="training prompts that get responses; 0 samples nothing")
    num_heldout_prompts: NonNegativeInt = Field(400, description="held-out prompts that get responses")
    responses_per_prompt: PositiveInt = Field(4, description="responses each prompt gets")
    temperatures: tuple[PositiveFloat, ...] = Field(
        (1.0,), min_length=1, strict=False, description="used in turn over the samples of a prompt"
    )
    top_k: PositiveInt | None = Field(None, description="only the k likeliest tokens may be drawn; null: all")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="only the fewest likeliest tokens whose probabilities reach p may be drawn (nucleus)"
    )
    models: tuple[str, ...] = Field(
        (),
        strict=False,
        description="folders under models/ that are sampled from too, in turn with the SFT model; each of them gets "
        "every temperature before the next has its turn",
    )
    models_folder: str = Field(
        PLACEHOLDER,
        description="the one folder that DVC watches for this stage: `models` and `best_of.reward_model` are it or lie "
        "under it. A run with --profile or --set finds it itself; in a params.yaml of your own it is named",
    )
    batch_size: PositiveInt = Field(256, description="most rows sampled at once")
    best_of: BestOfConfig = Field(default_factory=BestOfConfig)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for folder in self.models:
            check_folder(folder)
        if len(set(self.models)) < len(self.models):
            raise ValueError(f"models {list(self.models)} names a folder twice")
        check_watched(self.models_folder, self.folders, "generate")
        if self.best_of.keep == "contrast" and self.responses_per_prompt % 2:
            raise ValueError(
                f"responses_per_prompt {self.responses_per_prompt} must be even where best_of.keep is 'contrast': "
                "the best and the worst come in pairs"
            )
        return self

    @property
    def folders(self) -> tuple[str, ...]:
        """Every model folder that the stage reads."""
        return (*self.models, *([self.best_of.reward_model] if self.best_of.reward_model else []))


SourceName = Literal["file", "simulated"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRow:
    """What is known of a label source without asking it; how it is asked stands in `tasks/stages/label/sources.py`.

    Attributes:
        docs: one line for the reference page.
        simulated: where no person judged, what the report says of that; else empty.
    """

    docs: str
    simulated: str = ""


SOURCE_ROWS: Mapping[SourceName, SourceRow] = {
    "file": SourceRow(docs="votes from `data`, else its comparisons and rankings, else its grades"),
    "simulated": SourceRow(docs="the demo's annotators", simulated="preferences come from simulated annotators"),
}


class LabelConfig(Section):
    """Who says which response is better."""

    source: SourceName = Field(
        "simulated", description="; ".join(f"{name}: {row.docs}" for name, row in SOURCE_ROWS.items())
    )
    min_votes: PositiveInt = Field(1, description="pairs with fewer votes are left out")


class PreferencesConfig(Section):
    """From labelled pairs to a clean, balanced, split preference data set."""

    duplicate_threshold: Annotated[float, Field(ge=0.5, le=1.0)] = Field(
        0.9, description="Jaccard similarity of token triples at or above which two pairs are the same"
    )
    leakage_threshold: Annotated[float, Field(ge=0.5, le=1.0)] = Field(
        0.95, description="the same at or above which a training prompt counts as a held-out one"
    )
    leakage_one_word: bool = Field(
        True, description="so does a training prompt of at least four words that differs from one in a single word"
    )
    max_pairs_per_prompt: PositiveInt = Field(
        6, description="more training pairs than this are thinned by stable hash; rankings stay whole"
    )
    balance_task: bool = Field(False, description="thin task types to at most `balance_ratio` times the rarest")
    balance_length: bool = Field(False, description="thin pairs until the longer response wins as often as it loses")
    balance_ratio: Annotated[float, Field(ge=1.0)] = Field(4.0, description="see `balance_task`")
    min_margin: NonNegativeFloat = Field(0.0, description="pairs with a smaller mean vote strength are left out")
    keep_ties: bool = Field(False, description="hand pairs without a preference on too; the reward model reads them")
    min_grade_gap: NonNegativeFloat = Field(
        0.0, description="grades on a criterion that are no further apart prefer nothing"
    )
