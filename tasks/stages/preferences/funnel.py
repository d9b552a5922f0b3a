"""The steps from labelled pairs to clean, balanced ones, and how many pairs each of them left."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rlhf_core.config import PreferencesConfig
from rlhf_core.data.cleaning.balance import balance_lengths, balance_tasks, cap_per_prompt
from rlhf_core.data.cleaning.duplicates import without_exact, without_near, without_near_contradictions
from rlhf_core.data.cleaning.labelled import Preference, to_preference, without_contradictions, without_equal

Pairs = list[Preference]


class Funnel:
    """The pairs in hand and what each step made of them."""

    def __init__(self, pairs_in: int) -> None:
        self.steps: list[dict[str, Any]] = []
        self._before = pairs_in

    def record(self, step: str, pairs_out: int, reason: str) -> None:
        """Note how many pairs are left after a step."""
        removed = self._before - pairs_out
        self.steps.append(
            {"step": step, "pairs_in": self._before, "pairs_out": pairs_out, "removed": removed, "reason": reason}
        )
        self._before = pairs_out

    def removed(self) -> dict[str, int]:
        """Pairs that each step left out."""
        return {step["step"]: step["removed"] for step in self.steps}


def clean(rows: Iterable[Mapping[str, Any]], config: PreferencesConfig) -> tuple[Pairs, Funnel]:
    """Leave out what prefers nothing, contradicts itself or stands there twice; the result knows no order of rows."""
    number, pairs = 0, []
    for row in rows:
        number += 1
        if pair := to_preference(row):
            pairs.append(pair)
    funnel = Funnel(number)
    funnel.record("ties", len(pairs), "the votes prefer neither response")
    alike = f"Jaccard similarity at least {config.duplicate_threshold:g}, same numbers and signs"
    steps: list[tuple[str, str, Callable[[Pairs], Pairs]]] = [
        (
            "min_margin",
            f"mean vote strength below {config.min_margin:g}",
            lambda some: [pair for pair in some if pair.margin >= config.min_margin],
        ),
        (
            "equal_responses",
            "the responses look the same but for case and white space",
            without_equal,
        ),
        ("contradictions", "other rows say the opposite with at least as much strength", without_contradictions),
        (
            "near_contradictions",
            f"pairs that are alike ({alike}) say the opposite with at least as much strength",
            lambda some: without_near_contradictions(some, config.duplicate_threshold),
        ),
        ("exact_duplicates", "the same prompt, chosen and rejected response again", without_exact),
        (
            "near_duplicates",
            f"prompt and both responses alike ({alike})",
            lambda some: without_near(some, config.duplicate_threshold),
        ),
    ]
    for name, reason, step in steps:
        pairs = step(pairs)
        funnel.record(name, len(pairs), reason)
    return pairs, funnel


def leakage_reason(config: PreferencesConfig) -> str:
    """Why a training prompt is left out beside held-out ones."""
    word = " or but for one word" if config.leakage_one_word else ""
    return f"asks what a held-out prompt asks (Jaccard similarity at least {config.leakage_threshold:g}{word})"


def balance(train: Pairs, num_heldout: int, funnel: Funnel, config: PreferencesConfig) -> Pairs:
    """Thin the training pairs; held-out pairs stay as people labelled them."""
    train = cap_per_prompt(train, config.max_pairs_per_prompt)
    most = config.max_pairs_per_prompt
    funnel.record("cap_per_prompt", len(train) + num_heldout, f"training prompts with more than {most} pairs")
    if config.balance_task:
        train = balance_tasks(train, config.balance_ratio)
        reason = f"tasks with more than {config.balance_ratio:g} times the pairs of the rarest"
        funnel.record("balance_task", len(train) + num_heldout, reason)
    if config.balance_length:
        train = balance_lengths(train)
        funnel.record("balance_length", len(train) + num_heldout, "the longer response chosen more often, or less")
    return train
