"""The prompts that a policy is aligned on, watched on, and measured on afterwards."""

from transformers import PreTrainedTokenizerBase

from rlhf_core.errors import DataError
from rlhf_core.text.tokenizer import encode_prompts
from tasks import paths
from tasks.frame.stage import Stage
from tasks.stages.texts import count_texts
from tasks.tables import read_table

Prompt = tuple[str, list[int]]
"""Text and tokens."""


def training_prompts(stage: Stage, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Training prompts; more than one row with the same text counts once.

    Raises:
        DataError: there is none.
    """
    cure = "name prompts, demonstrations or comparisons under data"
    return _prompts(stage, tokenizer, "prompts.parquet", "training", cure)


def heldout_prompts(stage: Stage, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Held-out prompts, likewise.

    Raises:
        DataError: there is none.
    """
    return _prompts(stage, tokenizer, "heldout_prompts.parquet", "held-out", "name heldout_prompts under data")


def _prompts(stage: Stage, tokenizer: PreTrainedTokenizerBase, file: str, kind: str, cure: str) -> list[Prompt]:
    path = paths.VALIDATE / file
    texts = list(dict.fromkeys(row["prompt"] for row in read_table(stage.root / path)))
    if not texts:
        raise DataError(f"{path}: no {kind} prompt. Fix: {cure}")
    limit, counts = stage.params.model.max_prompt_tokens, count_texts(stage, f"{kind} prompts")
    return list(zip(texts, encode_prompts(tokenizer, texts, limit, counts), strict=True))
