"""Every setting of a run: one section a stage, the same names as in `params.yaml` and `dvc.yaml`.

Importing this module costs no torch: the command line and the schema export read it too.
"""

from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

Share = Annotated[float, Field(ge=0.0, le=1.0)]
OpenShare = Annotated[float, Field(ge=0.0, lt=1.0)]
Correlation = Annotated[float, Field(ge=-1.0, le=1.0)]


class Section(BaseModel):
    """Base of every section: unknown keys fail, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ComputeConfig(Section):
    """Where and how tensors are computed; part of what decides the bytes of a result."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes the GPU where there is one")
    threads: PositiveInt = Field(2, description="CPU threads of a stage; another number gives other last bits")


class ModelConfig(Section):
    """The language model that every stage starts from: built from numbers, or loaded from a local folder."""

    source: Literal["config", "folder"] = Field("config", description="build from these numbers, or load `path`")
    path: str | None = Field(None, description="local folder with a pretrained model and tokenizer (source: folder)")
    family: Literal["llama", "qwen2"] = Field("llama", description="architecture (source: config)")
    hidden_size: PositiveInt = Field(128, description="width (source: config)")
    layers: PositiveInt = Field(2, description="decoder layers (source: config)")
    heads: PositiveInt = Field(4, description="attention heads (source: config)")
    intermediate_size: PositiveInt = Field(256, description="width of the feed-forward part (source: config)")
    init_std: PositiveFloat = Field(0.05, description="standard deviation of the initial weights (source: config)")
    vocab_size: PositiveInt = Field(1024, description="largest vocabulary of the tokenizer trained on the corpus")
    max_prompt_tokens: PositiveInt = Field(160, description="longer prompts lose their beginning")
    max_response_tokens: PositiveInt = Field(56, description="longer responses lose their end")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.source == "folder" and not self.path:
            raise ValueError("source 'folder' needs `path`, a local folder with model and tokenizer")
        if self.hidden_size % self.heads:
            raise ValueError(f"heads {self.heads} must divide hidden_size {self.hidden_size}")
        return self


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


class SFTConfig(Section):
    """Supervised fine-tuning on responses only."""

    max_steps: PositiveInt = Field(550, description="optimiser steps")
    batch_size: PositiveInt = Field(32, description="demonstrations an optimiser step")
    accumulation: PositiveInt = Field(1, description="micro-batches an optimiser step is split into")
    learning_rate: PositiveFloat = Field(3e-3, description="peak learning rate")
    warmup_steps: NonNegativeInt = Field(20, description="steps of linear warm-up before the cosine")
    min_learning_rate_share: Share = Field(0.1, description="the cosine ends at this share of the peak")
    weight_decay: NonNegativeFloat = Field(0.01, description="decoupled weight decay")
    max_grad_norm: PositiveFloat = Field(1.0, description="gradients are clipped to this norm")
    heldout_share: OpenShare = Field(0.03, description="share of demonstrations kept for the held-out loss")
    eval_every: PositiveInt = Field(100, description="steps between held-out losses")
    patience: PositiveInt = Field(3, description="held-out losses without a new best before training stops")
    save_every: PositiveInt = Field(100, description="steps between checkpoints")

    @model_validator(mode="after")
    def _splits(self) -> Self:
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation {self.accumulation} must divide batch_size {self.batch_size}")
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


class RewardConfig(Section):
    """Bradley-Terry reward model, initialised from the SFT model."""

    head: Literal["last", "mean", "sum", "gated"] = Field(
        "last", description="scalar at the last token, its mean or sum, or the log-probability-gated sum"
    )
    epochs: PositiveInt = Field(2, description="passes over the preference pairs")
    prompts_per_step: PositiveInt = Field(
        12, description="prompt groups an optimiser step; a group's pairs stay together"
    )
    learning_rate: PositiveFloat = Field(1e-3, description="peak learning rate")
    warmup_steps: NonNegativeInt = Field(20, description="steps of linear warm-up")
    min_learning_rate_share: Share = Field(0.1, description="the linear decay ends at this share of the peak")
    weight_decay: NonNegativeFloat = Field(0.01, description="decoupled weight decay")
    max_grad_norm: PositiveFloat = Field(1.0, description="gradients are clipped to this norm")
    centering: NonNegativeFloat = Field(0.001, description="weight of the squared score, which keeps scores near zero")
    save_every: PositiveInt = Field(40, description="steps between checkpoints")
    min_pairwise_accuracy: Share = Field(0.5, description="gate: the stage fails with exit code 3 below this")
    min_spearman: Correlation | None = Field(None, description="gate on the rank correlation with graded responses")
    min_kendall: Correlation | None = Field(None, description="gate on Kendall's tau-b with graded responses")
    max_ece: Share | None = Field(None, description="gate on the expected calibration error")


class DPOConfig(Section):
    """Direct preference optimisation."""

    beta: PositiveFloat = Field(0.1, description="strength of the pull to the reference")
    nll_coef: NonNegativeFloat = Field(0.0, description="weight of the chosen response's token-level log-likelihood")
    epochs: PositiveInt = Field(1, description="passes over the preference pairs")
    prompts_per_step: PositiveInt = Field(
        16, description="prompt groups an optimiser step; a group's pairs stay together"
    )
    learning_rate: PositiveFloat = Field(2e-4, description="peak learning rate")
    warmup_steps: NonNegativeInt = Field(10, description="steps of linear warm-up")
    min_learning_rate_share: Share = Field(0.1, description="the linear decay ends at this share of the peak")
    max_grad_norm: PositiveFloat = Field(1.0, description="gradients are clipped to this norm")
    save_every: PositiveInt = Field(40, description="steps between checkpoints")


class PPOConfig(Section):
    """Proximal policy optimisation against the frozen reward model."""

    steps: PositiveInt = Field(24, description="rollout batches")
    rollout_batch: PositiveInt = Field(64, description="prompts a rollout")
    minibatch: PositiveInt = Field(32, description="rows a gradient step")
    epochs: PositiveInt = Field(2, description="passes over a rollout")
    temperature: PositiveFloat = Field(1.0, description="of sampling and of every log-probability")
    learning_rate: PositiveFloat = Field(4e-4, description="of the policy")
    value_learning_rate: PositiveFloat = Field(1e-3, description="of the value model")
    warmup_steps: NonNegativeInt = Field(5, description="rollouts of linear warm-up")
    min_learning_rate_share: Share = Field(0.3, description="the linear decay ends at this share of the peak")
    clip_eps: PositiveFloat = Field(0.2, description="ratio clipping")
    value_clip_eps: PositiveFloat = Field(0.4, description="value clipping around the rollout's values")
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

    @model_validator(mode="after")
    def _minibatch_divides(self) -> Self:
        if self.rollout_batch % self.minibatch:
            raise ValueError(f"minibatch {self.minibatch} must divide rollout_batch {self.rollout_batch}")
        return self


class AlignConfig(Section):
    """Which algorithms align the policy; each is a stage `align@<algorithm>`."""

    algorithms: tuple[Literal["ppo", "dpo"], ...] = Field(("ppo", "dpo"), min_length=1, strict=False)
    ppo: PPOConfig = PPOConfig()
    dpo: DPOConfig = DPOConfig()


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
    min_pairwise_accuracy: Share = Field(0.5, description="reward model: held-out pairwise accuracy")
    min_spearman: Correlation | None = Field(
        None, description="reward model: rank correlation with graded responses; null where there are none"
    )


class Params(Section):
    """The whole of `params.yaml`."""

    seed: NonNegativeInt = Field(0, description="every random choice is addressed from this")
    compute: ComputeConfig = ComputeConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    validate_: ValidateConfig = Field(ValidateConfig(), alias="validate")
    sft: SFTConfig = SFTConfig()
    generate: GenerateConfig = GenerateConfig()
    label: LabelConfig = LabelConfig()
    preferences: PreferencesConfig = PreferencesConfig()
    reward: RewardConfig = RewardConfig()
    align: AlignConfig = AlignConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    gates: GatesConfig = GatesConfig()
