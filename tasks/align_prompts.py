"""The prompts that a policy is aligned on, and measured on afterwards."""

from transformers import PreTrainedTokenizerBase

from rlhf_core.errors import DataError
from rlhf_core.models.tokenizer import encode_prompts
from tasks import paths
from tasks.stage import Stage
from tasks.tables import read_table


def training_prompts(stage: Stage, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, list[int]]]:
    """Training prompts as text and tokens; more than one row with the same text counts once.

    Raises:
        DataError: there is none.
    """
    path = paths.VALIDATE / "prompts.parquet"
    texts = list(dict.fromkeys(row["prompt"] for row in read_table(stage.root / path)))
    if not texts:
        raise DataError(f"{path}: no training prompt. Fix: name prompts, demonstrations or comparisons under data")
    return list(zip(texts, encode_prompts(tokenizer, texts, stage.params.model.max_prompt_tokens), strict=True))
