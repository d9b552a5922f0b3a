"""What responses look like without a judge: how long, how varied, how repetitive."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_core.evaluation.intervals import bounds, grouped_share_interval

NGRAM = 3


def length_figures(num_tokens: Sequence[int], responses: Sequence[str], finished: Sequence[bool]) -> dict[str, Any]:
    """Return `tokens_mean`, `tokens_median`, `tokens_p95`, `words_mean`, `chars_mean`, `finished_share` and its bounds.

    A response is finished when the model ended it by itself before the length limit. Responses are to different
    prompts; with fewer than `MIN_GROUPS` of them there are no bounds.
    """
    tokens = np.asarray(num_tokens, dtype=np.float64)
    return {
        "tokens_mean": float(tokens.mean()),
        "tokens_median": float(np.median(tokens)),
        "tokens_p95": float(np.quantile(tokens, 0.95)),
        "words_mean": float(np.mean([len(text.split()) for text in responses])),
        "chars_mean": float(np.mean([len(text) for text in responses])),
        "finished_share": float(np.mean(finished)),
        **bounds("finished_share", grouped_share_interval(finished, range(len(finished)))),
    }


def variety_figures(responses: Sequence[str]) -> dict[str, Any]:
    """Return `distinct_share` (different texts over all) and `repetition` (mean of `repeated_share`)."""
    return {
        "distinct_share": len(set(responses)) / len(responses),
        "repetition": float(np.mean([repeated_share(text) for text in responses])),
    }


def repeated_share(text: str, size: int = NGRAM) -> float:
    """Return the share of a text's n-grams of `size` words that stood in it before; 0 for fewer than `size` words."""
    grams = word_ngrams(text, size)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def word_ngrams(text: str, size: int) -> list[tuple[str, ...]]:
    """Return the text's runs of `size` words in lower case, in order."""
    words = text.lower().split()
    return [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
