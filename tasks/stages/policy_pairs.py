"""The preference pairs that a policy learns from, or by which one of several is chosen."""

from transformers import PreTrainedTokenizerBase

from rlhf_core.data.batching.pairs import PreferencePair, encode_pairs
from rlhf_core.data.reading.kinds import OVERALL
from tasks import paths
from tasks.frame.stage import Stage
from tasks.stages.texts import count_texts, warn_of_texts
from tasks.tables import read_table


def policy_pairs(stage: Stage, tokenizer: PreTrainedTokenizerBase, split: str) -> list[PreferencePair]:
    """Pairs of `train` or `heldout` as tokens; may be none.

    Ties are left out, since they prefer nothing, and so are single criteria, since none of them is what a policy is to
    be good at. What was lost in making tokens is counted and told.
    """
    limits = stage.params.model
    rows = read_table(stage.root / paths.PREFERENCES / f"{split}.parquet").to_list()
    pairs = encode_pairs(
        tokenizer,
        [row for row in rows if not row.get("tie") and row.get("criterion", OVERALL) == OVERALL],
        max_prompt_tokens=limits.max_prompt_tokens,
        max_response_tokens=limits.max_response_tokens,
        counts=count_texts(stage, f"{split} pairs"),
    )
    warn_of_texts(stage)
    return pairs
