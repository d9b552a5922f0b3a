"""Stage `preferences`: labelled pairs become a clean, balanced preference data set, to train on and held out.

Every step only leaves pairs out, and says how many and why in `funnel.json`. Beside the preferences stands
`other_pairs.parquet`: ties, where they are kept, and the pairs on named criteria.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_core.data.cleaning.balance import cap_per_prompt, mean_length_difference, share_longer_chosen
from rlhf_core.data.cleaning.leakage import leaking_prompts
from rlhf_core.data.reading.kinds import OVERALL
from rlhf_core.errors import DataError
from rlhf_core.state.atomic import write_json
from tasks import paths
from tasks.frame.stage import Stage
from tasks.stages.held_out import with_split
from tasks.stages.notice import warn
from tasks.stages.preferences.funnel import Funnel, Pairs, balance, clean, leakage_reason
from tasks.stages.preferences.others import OtherPairs
from tasks.tables import SCHEMAS, Rows, read_table, write_table

MOVED = 0.05  # a shift of the share of longer chosen responses that is worth a line


def run(stage: Stage) -> dict[str, Any]:
    """Write `train.parquet`, `heldout.parquet`, `other_pairs.parquet`, `funnel.json` and `criteria_funnel.json`.

    Raises:
        DataError: no training pair or no held-out pair is left, or balancing is asked for and cannot be done.
    """
    config = stage.params.preferences
    rows = Rows(paths.LABEL / "pairs.parquet")
    grades = with_split(read_table(paths.VALIDATE / "criteria.parquet"))
    heldout_prompts = list(read_table(paths.VALIDATE / "heldout_prompts.parquet")["prompt"])
    cleaned, funnel = clean((row for row in rows if row["criterion"] == OVERALL), config)
    train = [pair for pair in cleaned if pair.split == "train"]
    heldout = [pair for pair in cleaned if pair.split == "heldout"]
    others = OtherPairs(rows, cleaned, grades, config)
    heldout_prompts += [*(pair.prompt for pair in heldout), *others.prompts("heldout")]
    train = _without_leaks(train, heldout_prompts, len(heldout), funnel, stage)
    before = train
    _say_what_the_cap_moves(train, config.max_pairs_per_prompt, stage)
    train = balance(train, len(heldout), funnel, config)
    others.finish(heldout_prompts)
    write_json(stage.out / "funnel.json", funnel.steps)
    write_json(stage.out / "criteria_funnel.json", {name: one.steps for name, one in others.funnels.items()})
    _refuse_empty(train, heldout, funnel)
    _write(stage.out / "train.parquet", train)
    _write(stage.out / "heldout.parquet", heldout)
    write_table(stage.out / "other_pairs.parquet", others.rows, SCHEMAS["other_pairs"])
    return _metrics(before, train, heldout, funnel) | others.figures()


def _without_leaks(train: Pairs, heldout: Sequence[str], num_heldout: int, funnel: Funnel, stage: Stage) -> Pairs:
    """Training pairs whose prompt is nearly a held-out one are left out; an equal prompt is held out already."""
    config = stage.params.preferences
    prompts = (pair.prompt for pair in train)
    leaking = leaking_prompts(prompts, heldout, config.leakage_threshold, one_word=config.leakage_one_word)
    kept = [pair for pair in train if pair.prompt not in leaking]
    funnel.record("leakage", len(kept) + num_heldout, leakage_reason(config))
    return kept


def _say_what_the_cap_moves(train: Pairs, most: int, stage: Stage) -> None:
    """A cap is drawn without regard to length, but prompts with many pairs may be others than those with few."""
    before, after = share_longer_chosen(train), share_longer_chosen(cap_per_prompt(train, most))
    if before is not None and after is not None and abs(after - before) > MOVED:
        warn(
            stage,
            f"max_pairs_per_prompt moves the share of pairs whose longer response is chosen from {before:.3f} to "
            f"{after:.3f}. Fix: raise it, or set balance_length",
        )


def _refuse_empty(train: Pairs, heldout: Pairs, funnel: Funnel) -> None:
    for side, words in ((train, "training"), (heldout, "held-out")):
        if not side:
            lost = ", ".join(f"{step['step']} {step['removed']}" for step in funnel.steps if step["removed"])
            raise DataError(
                f"preferences: no {words} pair is left of {funnel.steps[0]['pairs_in']} (left out: {lost or 'none'}). "
                f"Fix: label more pairs on such prompts (on {OVERALL!r}, which no other criterion replaces), set "
                "data.heldout_share, or relax section preferences"
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
