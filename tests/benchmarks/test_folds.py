"""Folds by prompt, the regression on words, and the table, on rows made by hand."""

from collections import Counter

import numpy as np
import pytest

from benchmarks.folds import card_of, fold_of, page, sides, word_margins


def rows(count: int = 60) -> list[dict[str, str]]:
    return [
        {
            "prompt": f"question number {n % 30} about thing {n % 30}",
            "chosen": "a kind reply",
            "rejected": "a rude word",
        }
        for n in range(count)
    ]


def test_every_pair_is_held_out_once_and_pairs_of_a_prompt_together() -> None:
    held = [sides(rows(), fold, 5, 1.0)[1] for fold in range(5)]
    assert sum(map(len, held)) == 60
    assert all(count == 2 for count in Counter(row["prompt"] for some in held for row in some).values())
    for fold in range(5):
        train, some = sides(rows(), fold, 5, 1.0)
        assert not {row["prompt"] for row in train} & {row["prompt"] for row in some}
        assert {fold_of(row["prompt"], 5) for row in some} <= {fold}


def test_prompts_that_nearly_are_held_out_are_not_learned_from() -> None:
    """Two prompts of thirty words that differ in one, in different folds."""
    words = " ".join(f"word{n}" for n in range(30))
    twins = [f"{words} {ending}" for ending in ("a", "b", "c", "d", "e", "f", "g", "h")]
    one = twins[0]
    other = next(text for text in twins if fold_of(text, 2) != fold_of(one, 2))
    pairs = [{"prompt": text, "chosen": "x", "rejected": "y"} for text in (one, other)]
    assert sides(pairs, fold_of(one, 2), 2, 1.0)[0] == [pairs[1]]
    assert sides(pairs, fold_of(one, 2), 2, 0.5)[0] == []


def test_words_that_only_one_side_uses_decide() -> None:
    margins = word_margins(
        rows(40), [{"chosen": "kind reply", "rejected": "rude"}, {"chosen": "rude", "rejected": "kind"}]
    )
    assert margins[0] > 0 > margins[1]
    assert margins[0] == pytest.approx(-word_margins(rows(40), [{"chosen": "rude", "rejected": "kind reply"}])[0])


def fold(chosen: list[float], rejected: list[float], words: list[float]) -> dict[str, object]:
    count = len(chosen)
    return {
        "chosen": chosen, "rejected": rejected, "words": words, "prompts": [f"{chosen}{n}" for n in range(count)],
        "chosen_chars": [5] * count, "rejected_chars": [9] * count,
        "training_cpu_seconds": 60.0, "training_tokens": 6000, "peak_mb": 100.0 * count,
    }  # fmt: skip


def test_pooled_figures_are_over_all_pairs() -> None:
    """3 of 4 and 1 of 2 by the model: 4 of 6; by words 1 of 4 and 2 of 2; the longer one never."""
    found = [
        fold([1.0, 2.0, 3.0, 0.0], [0.0, 0.0, 0.0, 1.0], [1.0, -1.0, -1.0, -1.0]),
        fold([1.0, 0.0], [0.0, 1.0], [1.0, 1.0]),
    ]
    assert card_of(found)["pairwise_accuracy"] == pytest.approx(4 / 6)
    assert card_of(found, words=True)["pairwise_accuracy"] == pytest.approx(3 / 6)
    assert card_of(found)["longer_accuracy"] == 0.0
    last = page(found).splitlines()[-1]
    assert last.startswith("| pooled | 6 | 0.667 [")
    assert last.endswith("| 2.0 | 100 | 400 |")
    assert np.isfinite(card_of(found)["pairwise_accuracy_low"])
