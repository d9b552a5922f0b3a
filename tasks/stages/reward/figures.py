"""What the reward stage publishes of a trained model beside its weights: tables, and figures of what it is made of."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_core.config import RewardConfig
from rlhf_core.data.batching.pair_table import pair_table, rankings_apart
from rlhf_core.data.batching.pairs import PreferenceGroup
from rlhf_core.data.reading.kinds import OVERALL
from rlhf_core.evaluation.calibration import calibration_bins
from rlhf_core.evaluation.response_scores import ResponseScore
from rlhf_core.evaluation.uncertainty import (
    accuracy_figures,
    majority_margins,
    margin_deviations,
    member_margins,
    uncertainty_figures,
)
from rlhf_core.trainers.reward.ranking_losses import REWARD_LOSSES, split_rankings

CONFIDENCE = 0.95
Row = Mapping[str, Any]
Readings = Sequence[ResponseScore]


def pair_rows(rows: Sequence[Row], chosen: Readings, rejected: Readings, unit: float) -> Iterator[dict[str, Any]]:
    """Rows of heldout_scores.parquet."""
    nothing: list[float | None] = [None] * len(rows)
    deviations = margin_deviations(chosen, rejected, unit) or nothing
    for row, better, worse, deviation in zip(rows, chosen, rejected, deviations, strict=True):
        yield {
            "pair_id": row["pair_id"],
            "prompt_id": row["prompt_id"],
            "chosen_score": better.score,
            "rejected_score": worse.score,
            "margin": better.score - worse.score,
            "margin_deviation": deviation,
            "chosen_chars": len(row["chosen"]),
            "rejected_chars": len(row["rejected"]),
        }


def graded_rows(rows: Sequence[Row], readings: Readings) -> Iterator[dict[str, Any]]:
    """Rows of graded_scores.parquet."""
    for row, reading in zip(rows, readings, strict=True):
        kept = {key: row[key] for key in ("id", "prompt", "response", "score")}
        yield kept | {"model_score": reading.score, "deviation": reading.deviation}


def calibration(
    card: Row, rows: Sequence[Row], chosen: Readings, rejected: Readings, margin_scale: float
) -> dict[str, Any]:
    """The content of calibration.json."""
    bins = calibration_bins(
        margins(chosen, rejected),
        margin_scale=margin_scale,
        confidence=CONFIDENCE,
        groups=[row["prompt_id"] for row in rows],
    )
    return {
        "bins": bins,
        **{key: card[key] for key in ("ece", "ece_low", "ece_high", "ece_plugin")},
        "margin_scale": margin_scale,
        "num_heldout_pairs": card["num_heldout_pairs"],
    }


def margins(chosen: Readings, rejected: Readings) -> list[float]:
    """Score of the chosen less that of the rejected response."""
    return [better.score - worse.score for better, worse in zip(chosen, rejected, strict=True)]


def uncertainty(
    chosen: Readings, rejected: Readings, unit: float, grades: Sequence[float], graded: Readings
) -> dict[str, Any]:
    """`uncertainty`: whether the model is unsure where it is wrong; nothing where it gives no deviations."""
    deviations = margin_deviations(chosen, rejected, unit)
    if not deviations:
        return {}
    spread = [reading.deviation or 0.0 for reading in graded]
    triple = (grades, [reading.score for reading in graded], spread)
    return {"uncertainty": uncertainty_figures(margins(chosen, rejected), deviations, triple)}


def member_figures(
    rows: Sequence[Row],
    chosen: Readings,
    rejected: Readings,
    left_out: Sequence[float | None],
    weights: Sequence[float],
) -> dict[str, Any]:
    """`ensemble`: what each member has right, on held-out pairs and on the training prompts it did not draw."""
    prompts = [row["prompt_id"] for row in rows]
    by_member = zip(member_margins(chosen, rejected), left_out, weights, strict=True)
    members = {
        f"member-{number}": {
            **accuracy_figures("pairwise_accuracy", own, prompts),
            "left_out_accuracy": outside,
            "weight": weight,
        }
        for number, (own, outside, weight) in enumerate(by_member)
    }
    majority = accuracy_figures("majority_accuracy", majority_margins(chosen, rejected), prompts)
    return {"ensemble": {**members, **majority}}


def criterion_figures(cfg: RewardConfig, rows: Sequence[Row], chosen: Readings, rejected: Readings) -> dict[str, Any]:
    """`criteria`: pairwise accuracy of each criterion's own score on its held-out pairs; rows name their criterion."""
    if len(cfg.criteria) == 1:
        return {}
    found = {}
    for place, name in enumerate(cfg.criteria):
        own = [
            (better.criteria[place] - worse.criteria[place], row["prompt_id"])
            for row, better, worse in zip(rows, chosen, rejected, strict=True)
            if row.get("criterion", OVERALL) == name and better.criteria
        ]
        found[name] = {
            **accuracy_figures("pairwise_accuracy", [margin for margin, _ in own], [prompt for _, prompt in own]),
            "num_heldout_pairs": len(own),
            "weight": cfg.criteria[name],
        }
    return {"criteria": found}


def ranking_figures(cfg: RewardConfig, groups: Sequence[PreferenceGroup]) -> dict[str, Any]:
    """`rankings`, under a loss on them: how many were read off the training pairs, and how many were not.

    Those whose pairs are no single order were trained on as pairs. Pairs of no ranking count as one a prompt and
    criterion.
    """
    if not REWARD_LOSSES[cfg.loss.name].row.of_rankings:
        return {}
    tables = [table for name in cfg.criteria if len(table := pair_table(groups, [name]))]
    apart = [rankings_apart(table)[0] for table in tables]
    read = sum(len(split_rankings(table)[0]) for table in apart)
    return {"rankings": {"num_read": read, "num_as_pairs": sum(len(table.group_N.unique()) for table in apart) - read}}
