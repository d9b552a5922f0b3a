"""Any folder with a reward model as a function of texts: ours, or a sequence classifier from elsewhere.

What a model wrote is read as text wherever the reward model may have another tokenizer than the model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from rlhf_core.engine.batches import ROWS_AT_ONCE
from rlhf_core.evaluation.response_scores import reward_scores
from rlhf_core.models.folders.architecture import read_config
from rlhf_core.models.scoring.ensemble import load_reward_model, tokenizer_folder
from rlhf_core.models.scoring.foreign import (
    ForeignRewardModel,
    is_foreign,
    load_scoring_tokenizer,
    read_rows,
    room_of,
)
from rlhf_core.text.encoded import TextCounts
from rlhf_core.text.tokenizer import encode_prompts, encode_samples, load_tokenizer

TextScorer = Callable[[Sequence[str], Sequence[str]], list[float]]
"""Prompts and their responses to a score each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextLimits:
    """Most tokens of a prompt and of a response that our own reward models read; others have limits of their own."""

    prompt: int
    response: int


def load_text_scorer(folder: Path, limits: TextLimits, device: torch.device) -> TextScorer:
    """The reward model of a folder as a function of texts.

    Raises:
        EnvironmentProblem, ConfigError: see `load_reward_model` and `ForeignRewardModel.load`.
    """
    if is_foreign(folder):
        foreign = ForeignRewardModel.load(folder).to(device)
        return lambda prompts, responses: foreign.score_texts(prompts, responses, ROWS_AT_ONCE)
    model, tokenizer = load_reward_model(folder).to(device).eval(), load_tokenizer(tokenizer_folder(folder))

    def score(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        rows = _tokens(tokenizer, limits, prompts, responses)
        return reward_scores(model, *rows, pad_id=tokenizer.pad_token_id)

    return score


def count_scored_texts(
    folder: Path, limits: TextLimits, prompts: Sequence[str], responses: Sequence[str], counts: TextCounts
) -> None:
    """Tell `counts` what texts lose when the folder's reward model reads them; no weights are loaded."""
    if is_foreign(folder):
        tokenizer = load_scoring_tokenizer(folder)
        read_rows(tokenizer, prompts, responses, room_of(read_config(folder), tokenizer), counts)
    else:
        _tokens(load_tokenizer(tokenizer_folder(folder)), limits, prompts, responses, counts)


def _tokens(
    tokenizer: PreTrainedTokenizerBase,
    limits: TextLimits,
    prompts: Sequence[str],
    responses: Sequence[str],
    counts: TextCounts | None = None,
) -> tuple[list[list[int]], list[list[int]]]:
    return (
        encode_prompts(tokenizer, prompts, limits.prompt, counts),
        encode_samples(tokenizer, responses, limits.response, counts),
    )
