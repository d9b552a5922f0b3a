"""What the stage `generate` samples from, and by what it picks among candidates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_core.config import GenerateConfig
from rlhf_core.engine.batches import ROWS_AT_ONCE
from rlhf_core.evaluation.policy_measurement import response_logprob_sums
from rlhf_core.evaluation.response_scores import reward_scores
from rlhf_core.models.checks import check_fit
from rlhf_core.models.policy import load_policy
from rlhf_core.models.scoring.ensemble import load_reward_model, tokenizer_folder
from rlhf_core.models.scoring.foreign import ForeignRewardModel, is_foreign
from rlhf_core.rollout.sampler import Sampling
from rlhf_core.text.encoded import TextCounts
from rlhf_core.text.tokenizer import encode_prompts, encode_samples, load_tokenizer
from tasks import paths
from tasks.frame.stage import Stage
from tasks.stages.texts import count_texts

SFT = "sft"


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleSpec:
    """One sample that each prompt gets: its number addresses its random numbers."""

    number: int
    model: str
    temperature: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A model that is sampled from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling


def plan(cfg: GenerateConfig, count: int) -> list[SampleSpec]:
    """The samples of a prompt: every temperature in turn, then the same of the next model, then from the start."""
    models = (SFT, *cfg.models)
    return [
        SampleSpec(
            number=number,
            model=models[number // len(cfg.temperatures) % len(models)],
            temperature=cfg.temperatures[number % len(cfg.temperatures)],
        )
        for number in range(count)
    ]


def load_source(stage: Stage, name: str) -> Source:
    """Load the SFT model, or a folder under models/.

    Raises:
        EnvironmentProblem: the folder or files in it are missing.
        ConfigError: the model of the folder cannot be used, see `load_policy` and `check_fit`.
    """
    folder = stage.root / (paths.SFT / "model" if name == SFT else name)
    model, tokenizer = load_policy(folder).to(stage.device), load_tokenizer(folder)
    limits = stage.params.model
    if name != SFT:
        check_fit(model, tokenizer, limits.max_prompt_tokens + limits.max_response_tokens, name)
    return Source(model=model, tokenizer=tokenizer, sampling=Sampling.of(model, tokenizer, limits.max_response_tokens))


def score_candidates(stage: Stage, prompts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """A score for each response, read as text, since its tokens may be another model's: the higher the better."""
    cfg, limits = stage.params.generate.best_of, stage.params.model
    folder = stage.root / (paths.SFT / "model" if cfg.scorer == "likelihood" else str(cfg.reward_model))
    counts = count_texts(stage, "scored candidates")
    if cfg.scorer == "reward_model" and is_foreign(folder):
        foreign = ForeignRewardModel.load(folder).to(stage.device)
        return foreign.score_texts(prompts, [row["response"] for row in rows], ROWS_AT_ONCE, counts)
    tokenizer = load_tokenizer(tokenizer_folder(folder))
    pad_id = tokenizer.pad_token_id
    prompt_ids = encode_prompts(tokenizer, prompts, limits.max_prompt_tokens, counts)
    response_ids = _as_written(tokenizer, rows, limits.max_response_tokens, counts)
    match cfg.scorer:
        case "likelihood":
            model = load_policy(folder).to(stage.device)
            summed = response_logprob_sums(model, prompt_ids, response_ids, pad_id=pad_id)
            return [float(total) / len(ids) for total, ids in zip(summed, response_ids, strict=True)]
        case "reward_model":
            model = load_reward_model(folder).to(stage.device)
            return reward_scores(model, prompt_ids, response_ids, pad_id=pad_id)


def _as_written(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]], max_tokens: int, counts: TextCounts
) -> list[list[int]]:
    """Tokens of responses; one that did not end by itself has no end token, unless it has no other."""
    encoded = encode_samples(tokenizer, [row["response"] for row in rows], max_tokens, counts)
    end = tokenizer.eos_token_id
    return [
        ids[:-1] if not row["finished"] and ids[-1] == end and len(ids) > 1 else ids
        for ids, row in zip(encoded, rows, strict=True)
    ]
