"""The preference pairs that a policy learns from, or by which one of several is chosen."""

from transformers import PreTrainedTokenizerBase

from rlhf_core.data.pairs import PreferencePair, encode_pairs
from tasks import paths
from tasks.stage import Stage
from tasks.tables import read_table


def policy_pairs(stage: Stage, tokenizer: PreTrainedTokenizerBase, split: str) -> list[PreferencePair]:
    """Pairs of `train` or `heldout` as tokens; may be none.

    Ties are left out, since they prefer nothing, and so are single criteria, since none of them is what a policy is to
    be good at.
    """
    limits = stage.params.model
    pairs = encode_pairs(
        tokenizer,
        read_table(stage.root / paths.PREFERENCES / f"{split}.parquet"),
        max_prompt_tokens=limits.max_prompt_tokens,
        max_response_tokens=limits.max_response_tokens,
    )
    return [pair for pair in pairs if not pair.label.tie and pair.label.criterion == "overall"]
