"""What figures of a stage say of its texts, in words: for the stage itself, the table of a run and the report."""

from collections.abc import Mapping
from typing import Any

MEANINGS = (
    ("responses_cut", "responses", "responses lost their end to model.max_response_tokens, so they have no end token"),
    ("prompts_cut", "prompts", "prompts lost their beginning to model.max_prompt_tokens"),
    (
        "responses_rewritten",
        "responses",
        "responses are not written whole by chat template or tokenizer: training leaves their rows out",
    ),
    (
        "prompts_rewritten",
        "prompts",
        "prompts are not written whole by chat template or tokenizer: what they leave out is not read",
    ),
    (
        "demonstrations_without_targets",
        "demonstrations",
        "demonstrations teach nothing: none of their replies is learned",
    ),
    ("scored_cut", "scored", "rows lost their beginning to the limit of the reward model that scores them"),
    (
        "scored_rewritten",
        "scored",
        "rows are not written whole by chat template or tokenizer of the reward model that scores them",
    ),
    ("pairs_equal_when_cut", "pairs", "pairs have two responses that are the same once they are cut"),
)


def texts_line(figures: Mapping[str, Any]) -> str:
    """What a stage's metrics say of its texts, in one line; empty where nothing was lost."""
    lost = [
        f"{figures[name]:,} of {figures.get(f'{kind}_encoded', 0):,} {meaning}"
        for name, kind, meaning in MEANINGS
        if figures.get(name)
    ]
    return "; ".join(lost)
