"""Stage `preferences`: labelled pairs become a clean, balanced preference data set, split by prompt group.

Every step only leaves pairs out, and says how many and why in `funnel.json`. Beside the preferences stands
`other_pairs.parquet`: ties, where they are kept, and the pairs that grades on named criteria make.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_core.config import PreferencesConfig
from rlhf_core.data.balance import (
    balance_lengths,
    balance_tasks,
    cap_per_prompt,
    mean_length_difference,
    share_longer_chosen,
)
from rlhf_core.data.duplicates import leaking_prompts, without_exact, without_near
from rlhf_core.data.labelled import Preference, to_preference, without_contradictions, without_equal
from rlhf_core.data.other_pairs import OVERALL, cap_by_criterion, graded_pairs, to_tie, without_decided
from rlhf_core.data.splits import is_heldout, prompt_group
from rlhf_core.errors import DataError
from rlhf_core.state.atomic import write_json
from tasks import paths
from tasks.stage import Stage
from tasks.tables import SCHEMAS, read_table, write_table

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


def run(stage: Stage) -> dict[str, Any]:
    """Write `train.parquet`, `heldout.parquet` and `funnel.json`.

    Raises:
        DataError: no training pair or no held-out pair is left, or balancing is asked for and cannot be done.
    """
    rows = read_table(paths.LABEL / "pairs.parquet").to_list()
    heldout_prompts = list(read_table(paths.VALIDATE / "heldout_prompts.parquet")["prompt"])
    cleaned, funnel = clean(rows, stage.params.preferences)
    train, heldout = _split(cleaned, heldout_prompts, stage.params.data.heldout_share)
    train = _without_leaks(train, [*heldout_prompts, *(pair.prompt for pair in heldout)], len(heldout), funnel, stage)
    before = train
    train = balance(train, len(heldout), funnel, stage.params.preferences)
    write_json(stage.out / "funnel.json", funnel.steps)
    _refuse_empty(train, heldout, funnel)
    _write(stage.out / "train.parquet", train)
    _write(stage.out / "heldout.parquet", heldout)
    others = _other_pairs(rows, cleaned, [*heldout_prompts, *(pair.prompt for pair in heldout)], stage)
    write_table(stage.out / "other_pairs.parquet", others, SCHEMAS["other_pairs"])
    return _metrics(before, train, heldout, funnel) | _other_metrics(others)


def clean(rows: Sequence[Mapping[str, Any]], config: PreferencesConfig) -> tuple[Pairs, Funnel]:
    """Leave out what prefers nothing, contradicts itself or stands there twice; the result knows no order of rows."""
    funnel = Funnel(len(rows))
    pairs = [pair for row in rows if (pair := to_preference(row))]
    funnel.record("ties", len(pairs), "the votes prefer neither response")
    steps: list[tuple[str, str, Callable[[Pairs], Pairs]]] = [
        (
            "min_margin",
            f"mean vote strength below {config.min_margin:g}",
            lambda some: [pair for pair in some if pair.margin >= config.min_margin],
        ),
        ("equal_responses", "the responses are the same but for case, white space or Unicode form", without_equal),
        ("contradictions", "other rows say the opposite with at least as much strength", without_contradictions),
        ("exact_duplicates", "the same prompt, chosen and rejected response again", without_exact),
        (
            "near_duplicates",
            f"prompt and both responses at least {config.duplicate_threshold:g} alike (Jaccard), same numbers",
            lambda some: without_near(some, config.duplicate_threshold),
        ),
    ]
    for name, reason, step in steps:
        pairs = step(pairs)
        funnel.record(name, len(pairs), reason)
    return pairs, funnel


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


def _split(pairs: Pairs, heldout_prompts: Sequence[str], share: float) -> tuple[Pairs, Pairs]:
    groups = {prompt_group(prompt) for prompt in heldout_prompts}
    train: Pairs = []
    heldout: Pairs = []
    for pair in pairs:
        side = heldout if pair.group in groups or is_heldout(pair.group, share) else train
        side.append(pair)
    return train, heldout


def _without_leaks(train: Pairs, heldout: Sequence[str], num_heldout: int, funnel: Funnel, stage: Stage) -> Pairs:
    """Training pairs whose prompt is nearly a held-out one are left out; an equal prompt is held out already."""
    threshold = stage.params.preferences.leakage_threshold
    leaking = leaking_prompts((pair.prompt for pair in train), heldout, threshold)
    kept = [pair for pair in train if pair.prompt not in leaking]
    reason = f"a training prompt at least {threshold:g} like a held-out one (Jaccard), same numbers"
    funnel.record("leakage", len(kept) + num_heldout, reason)
    return kept


def _other_pairs(
    rows: Sequence[Mapping[str, Any]], decided: Pairs, heldout_prompts: Sequence[str], stage: Stage
) -> list[dict[str, Any]]:
    """Ties and pairs of grades with their split; no training prompt is nearly a held-out one."""
    config = stage.params.preferences
    ties = [tie for row in rows if (tie := to_tie(row))] if config.keep_ties else []
    found = [
        {name: getattr(tie, name) for name in SCHEMAS["train"].names} | {"criterion": OVERALL, "tie": True}
        for tie in without_decided(without_equal(ties), decided)
    ]
    criteria = paths.VALIDATE / "criteria.parquet"
    if criteria.exists():
        found += graded_pairs(read_table(criteria), config.min_grade_gap, keep_ties=config.keep_ties)
    groups = {prompt_group(prompt) for prompt in heldout_prompts}
    share = stage.params.data.heldout_share

    def side(prompt: str) -> str:
        group = prompt_group(prompt)
        return "heldout" if group in groups or is_heldout(group, share) else "train"

    split = [row | {"split": side(row["prompt"])} for row in found]
    sides = {name: [row["prompt"] for row in split if row["split"] == name] for name in ("train", "heldout")}
    leaking = leaking_prompts(sides["train"], [*heldout_prompts, *sides["heldout"]], config.leakage_threshold)
    kept = [row for row in split if row["split"] == "heldout" or row["prompt"] not in leaking]
    capped = cap_by_criterion(kept, config.max_pairs_per_prompt)
    return sorted(capped, key=lambda row: (row["criterion"], row["prompt_id"], row["pair_id"]))


def _other_metrics(others: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts of training ties, and of other training pairs by criterion; nothing where there are none."""
    training = [row for row in others if row["split"] == "train"]
    ties = sum(row["tie"] for row in training)
    criteria = Counter(row["criterion"] for row in training if not row["tie"])
    return ({"ties_train": ties} if ties else {}) | ({"criteria": dict(sorted(criteria.items()))} if criteria else {})


def _refuse_empty(train: Pairs, heldout: Pairs, funnel: Funnel) -> None:
    for side, words in ((train, "training"), (heldout, "held-out")):
        if not side:
            lost = ", ".join(f"{step['step']} {step['removed']}" for step in funnel.steps if step["removed"])
            raise DataError(
                f"preferences: no {words} pair is left of {funnel.steps[0]['pairs_in']} (left out: {lost or 'none'}). "
                "Fix: label more pairs on such prompts, set data.heldout_share, or relax section preferences"
            )


def _write(path: Path, pairs: Pairs) -> None:
    schema = SCHEMAS[path.stem]
    ordered = sorted(pairs, key=lambda pair: (pair.prompt_id, pair.pair_id, pair.chosen, pair.rejected))
    write_table(path, ({name: getattr(pair, name) for name in schema.names} for pair in ordered), schema)


def _metrics(before: Pairs, train: Pairs, heldout: Pairs, funnel: Funnel) -> dict[str, Any]:
    """Headline counts; `_before` is the training set before capping and balancing."""
    return {
        "pairs_in": funnel.steps[0]["pairs_in"],
        "pairs_train": len(train),
        "pairs_heldout": len(heldout),
        "prompts_train": len({pair.group for pair in train}),
        "prompts_heldout": len({pair.group for pair in heldout}),
        "removed": {step["step"]: step["removed"] for step in funnel.steps},
        "mean_length_difference": mean_length_difference(train),
        "mean_length_difference_before": mean_length_difference(before),
        "share_longer_chosen": share_longer_chosen(train),
        "share_longer_chosen_before": share_longer_chosen(before),
        "tasks": dict(sorted(Counter(pair.task for pair in train).items())),
    }
