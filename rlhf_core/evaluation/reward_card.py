"""The figures a reward model is judged by: does it agree with people, does it rank, is it calibrated.

Definitions, each over held-out pairs (chosen, rejected) unless said otherwise; margin = chosen score - rejected score:

- `pairwise_accuracy`: share of pairs with margin > 0, margin = 0 counts half. Its interval is Wilson's; with
  `prompt_ids` it is widened by the design effect of pairs that share a prompt.
- `longer_accuracy`: the same share for the rule "the longer response is better"; equal lengths count half.
- `ece`: expected calibration error of P(chosen is better) = sigmoid(margin_scale * margin). A pair has no natural
  first response, so it stands in both orientations: (p, 1) and (1 - p, 0). Folded on one half that is: confidence
  c = max(p, 1 - p) in [0.5, 1], right when margin > 0 (margin 0: half right); ten equal bins of c; mean over
  pairs of |mean confidence - accuracy| of the pair's bin (Guo et al. 2017, eq. 3, on the folded confidence).
- `length_correlation`: correlation of the margin with the difference in characters over both orientations, which
  is sum(m * d) / sqrt(sum(m^2) * sum(d^2)).
- `spearman`, `kendall`: rank correlation (tau-b) of given grades with model scores, all graded rows pooled;
  `spearman_low`, `spearman_high`: percentile bootstrap over prompts. `spearman_within`: mean over prompts.

An undefined figure is `None` and named with its reason under `undefined`; no figure is ever NaN.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from scipy.special import expit
from scipy.stats import kendalltau

from rlhf_core.evaluation.intervals import bootstrap_by_group, grouped_share_interval, wilson_interval
from rlhf_core.evaluation.ranks import mean_spearman_within, rank_levels, weighted_spearman

NUM_BINS = 10
Graded = tuple[Sequence[Hashable], Sequence[float], Sequence[float]]


def reward_card(
    chosen_scores: Sequence[float],
    rejected_scores: Sequence[float],
    chosen_chars: Sequence[int],
    rejected_chars: Sequence[int],
    graded: Graded | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    *,
    prompt_ids: Sequence[Hashable] | None = None,
    margin_scale: float = 1.0,
) -> dict[str, Any]:
    """Return every figure of the module's list as one JSON-able dictionary.

    `graded` is (prompt ids, given grades, model scores), one entry a graded response. `prompt_ids` gives the
    prompt of each pair. `margin_scale` turns a margin of scores into Bradley-Terry log-odds: 1 for the scores
    the model was trained with, its standard deviation for standardised ones. `seed` addresses the bootstrap.

    Raises ValueError for lists of unequal length and for scores that are not finite.
    """
    lengths = [len(chosen_scores), len(rejected_scores), len(chosen_chars), len(rejected_chars)]
    if prompt_ids is not None:
        lengths.append(len(prompt_ids))
    if len(set(lengths)) > 1:
        raise ValueError(f"scores, characters and prompt ids of the pairs differ in number: {lengths}")
    chosen, rejected = _finite("chosen_scores", chosen_scores), _finite("rejected_scores", rejected_scores)
    chars = np.asarray(chosen_chars, dtype=np.float64) - np.asarray(rejected_chars, dtype=np.float64)
    card = _pair_figures(chosen - rejected, chars, prompt_ids, confidence, margin_scale)
    undefined = card.pop("undefined")
    if graded is None or not len(graded[0]):
        figures: dict[str, Any] = dict.fromkeys(GRADED_FIGURES) | {"num_graded": 0, "num_graded_prompts": 0}
        undefined |= dict.fromkeys(GRADED_FIGURES, "no graded responses")
    else:
        figures = _graded_figures(*graded, confidence=confidence, seed=seed)
        undefined |= figures.pop("undefined")
    return card | figures | {"undefined": undefined}


GRADED_FIGURES = ("spearman", "spearman_low", "spearman_high", "spearman_within", "kendall")
PAIR_FIGURES = (
    "pairwise_accuracy", "pairwise_accuracy_low", "pairwise_accuracy_high", "longer_accuracy",
    "ece", "mean_margin", "length_correlation",
)  # fmt: skip


def _pair_figures(
    margins: np.ndarray,
    chars: np.ndarray,
    prompt_ids: Sequence[Hashable] | None,
    confidence: float,
    margin_scale: float,
) -> dict[str, Any]:
    count = len(margins)
    if not count:
        reasons = dict.fromkeys(PAIR_FIGURES, "no held-out pairs")
        return dict.fromkeys(PAIR_FIGURES) | {"num_heldout_pairs": 0, "undefined": reasons}
    right = (np.sign(margins) + 1.0) / 2.0
    if prompt_ids is not None:
        low, high = grouped_share_interval(right, prompt_ids, confidence)
    else:
        low, high = wilson_interval(float(right.sum()), count, confidence)
    undefined = {}
    length = math.sqrt(float((margins**2).sum()) * float((chars**2).sum()))
    if not length:
        side = "every margin is 0" if not margins.any() else "both responses of every pair are equally long"
        undefined["length_correlation"] = side
    return {
        "pairwise_accuracy": float(right.mean()),
        "pairwise_accuracy_low": low,
        "pairwise_accuracy_high": high,
        "num_heldout_pairs": count,
        "longer_accuracy": float(((np.sign(chars) + 1.0) / 2.0).mean()),
        "ece": expected_calibration_error(calibration_bins(margins, margin_scale=margin_scale)),
        "mean_margin": float(margins.mean()),
        "length_correlation": float((margins * chars).sum()) / length if length else None,
        "undefined": undefined,
    }


def _graded_figures(
    prompt_ids: Sequence[Hashable], given: Sequence[float], scores: Sequence[float], *, confidence: float, seed: int
) -> dict[str, Any]:
    grades, values = _finite("given grades", given), _finite("model scores", scores)
    if not len(prompt_ids) == len(grades) == len(values):
        raise ValueError("prompt ids, grades and scores of the graded responses differ in number")
    grade_levels, score_levels = rank_levels(grades), rank_levels(values)
    figures: dict[str, Any] = dict.fromkeys(GRADED_FIGURES)
    undefined: dict[str, str] = {}
    within, num_prompts = mean_spearman_within(prompt_ids, grades, values)
    figures |= {"num_graded": len(grades), "num_graded_prompts": len(set(prompt_ids)), "spearman_within": within}
    if within is None:
        undefined["spearman_within"] = (
            "the model gives every response of a prompt the same score"
            if num_prompts
            else "no prompt has two distinct grades"
        )
    figures["spearman"] = weighted_spearman(grade_levels, score_levels, np.ones(len(grades), dtype=np.int64))
    if figures["spearman"] is None:
        constant = "given grades" if not grade_levels.any() else "model scores"
        names = [name for name in GRADED_FIGURES if name != "spearman_within"]
        return figures | {"undefined": undefined | dict.fromkeys(names, f"the {constant} are constant")}
    figures["kendall"] = float(kendalltau(grades, values, variant="b").statistic)
    interval = bootstrap_by_group(
        prompt_ids,
        lambda weights: weighted_spearman(grade_levels, score_levels, weights),
        confidence=confidence,
        seed=seed,
    )
    if interval is None:
        undefined |= dict.fromkeys(("spearman_low", "spearman_high"), "too few prompts to resample")
    else:
        figures["spearman_low"], figures["spearman_high"] = interval
    return figures | {"undefined": undefined}


def calibration_bins(
    margins: Sequence[float] | np.ndarray,
    num_bins: int = NUM_BINS,
    *,
    margin_scale: float = 1.0,
    confidence: float = 0.95,
) -> list[dict[str, Any]]:
    """Return the non-empty bins of the reliability diagram, in order of confidence.

    Each bin: `low`, `high` (its edges in [0.5, 1]), `count`, `confidence` (mean predicted), `accuracy` (mean
    observed), `accuracy_low`, `accuracy_high` (Wilson). The edge cases: confidence 0.5 falls into the first
    bin and 1 into the last.
    """
    values = _finite("margins", margins)
    predicted = expit(margin_scale * np.abs(values))
    right = (np.sign(values) + 1.0) / 2.0
    place = np.clip(((predicted - 0.5) * 2.0 * num_bins).astype(np.int64), 0, num_bins - 1)
    bins = []
    for number in np.unique(place):
        rows = place == number
        count, correct = int(rows.sum()), float(right[rows].sum())
        low, high = wilson_interval(correct, count, confidence)
        bins.append(
            {
                "low": 0.5 + 0.5 * int(number) / num_bins,
                "high": 0.5 + 0.5 * (int(number) + 1) / num_bins,
                "count": count,
                "confidence": float(predicted[rows].mean()),
                "accuracy": correct / count,
                "accuracy_low": low,
                "accuracy_high": high,
            }
        )
    return bins


def expected_calibration_error(bins: Sequence[dict[str, Any]]) -> float | None:
    """Return the count-weighted mean of |confidence - accuracy| over bins, `None` without any."""
    count = sum(entry["count"] for entry in bins)
    if not count:
        return None
    return sum(entry["count"] * abs(entry["confidence"] - entry["accuracy"]) for entry in bins) / count


def _finite(name: str, values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return the values as float64; one NaN would otherwise turn every figure after it into a silent lie."""
    array = np.asarray(values, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        raise ValueError(f"{name}[{bad[0]}] is {array[bad[0]]}; scores must be finite")
    return array
