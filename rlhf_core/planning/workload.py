"""How much there is to read and to write: rows of each kind, and the tokens of a sample of them."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

LONGEST_SHARE = 1 / 16
"""Batches are sorted by length within chunks of 16: the longest of a chunk has the longest sixteenth of its rows."""


class Workload(BaseModel):
    """Rows and lengths, in tokens as the stages cut them.

    Attributes:
        demonstrations: those that are learned from.
        kept: those that are kept for the held-out loss.
        demonstration_lengths: (prompt, response) of some of them.
        pairs, groups: preference pairs to train on, and their prompts.
        group_lengths: prompt, then the distinct responses, of some of the groups.
        heldout_pairs, graded: rows that the reward model is judged by.
        prompts, heldout_prompts: distinct ones.
        prompt_lengths: of some of them.
        sampled: rows that lengths were counted of.
        counted: where rows are counted of, by name: `artifacts` of a stage that is up to date, or `data` files.
        text_s: seconds that a text takes to become tokens.
        characters: of a text, on average.
        vocabulary: tokens of the tokenizer; 0 where there is none yet.
    """

    model_config = ConfigDict(frozen=True)

    demonstrations: int = 0
    kept: int = 0
    demonstration_lengths: list[tuple[int, int]] = []
    pairs: int = 0
    groups: int = 0
    group_lengths: list[list[int]] = []
    heldout_pairs: int = 0
    graded: int = 0
    prompts: int = 0
    heldout_prompts: int = 0
    prompt_lengths: list[int] = []
    sampled: int = 0
    counted: dict[str, str] = {}
    text_s: float = 0.0
    characters: float = 0.0
    vocabulary: int = 0


def mean(numbers: Sequence[float]) -> float:
    """Their mean; 0 of none."""
    return sum(numbers) / len(numbers) if numbers else 0.0


def longest_mean(numbers: Sequence[float], share: float = LONGEST_SHARE) -> float:
    """Mean of the largest `share` of them, one at least; 0 of none."""
    ordered = sorted(numbers, reverse=True)
    return mean(ordered[: max(1, round(share * len(ordered)))])
