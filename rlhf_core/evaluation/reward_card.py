"""The figures a reward model is judged by: does it agree with people, does it rank, is it calibrated.

Definitions, each over held-out pairs (chosen, rejected) unless said otherwise; margin = chosen score - rejected score:

- `pairwise_accuracy`: share of pairs with margin > 0, margin = 0 counts half. Its interval is Wilson's; with
  `prompt_ids` it takes in that pairs on one prompt are not independent (`intervals.grouped_share_interval`).
- `longer_accuracy`: the same share for the rule "the longer response is better"; equal lengths count half.
- `ece`: expected calibration error of P(chosen is better) = sigmoid(margin_scale * margin), without what chance alone
  makes of it; `ece_plugin` with it (`calibration.calibration_error`).
- `length_correlation`: correlation of the margin with the difference in characters over both orientations, which
  is sum(m * d) / sqrt(sum(m^2) * sum(d^2)).
- `spearman`, `kendall`: rank correlation (tau-b) of given grades with model scores, all graded rows pooled; their
  intervals take prompts as what was sampled (`rank_intervals`). `spearman_within`: mean over prompts.

`<figure>_low` and `<figure>_high` are the ends of an interval; it needs five prompts.

An undefined figure is `None` and named with its reason under `undefined`; no figure is ever NaN.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from rlhf_core.evaluation.calibration import calibration_error
from rlhf_core.evaluation.intervals import bounds, finite, grouped_share_interval, mean_interval, too_few, why_no_bounds
from rlhf_core.evaluation.rank_intervals import rank_intervals
from rlhf_core.evaluation.ranks import spearman, spearman_within

Graded = tuple[Sequence[Hashable], Sequence[float], Sequence[float]]


@dataclass(frozen=True, slots=True)
class ScoredPairs:
    """Held-out pairs, one entry a pair in every column.

    Attributes:
        chosen_scores, rejected_scores: of the model.
        chosen_chars, rejected_chars: lengths of the responses.
        prompt_ids: the prompt of each pair; without it each pair counts as a prompt of its own.

    Raises:
        ValueError: columns of unequal length.
    """

    chosen_scores: Sequence[float]
    rejected_scores: Sequence[float]
    chosen_chars: Sequence[int]
    rejected_chars: Sequence[int]
    prompt_ids: Sequence[Hashable] | None = None

    def __post_init__(self) -> None:
        columns = (self.chosen_scores, self.rejected_scores, self.chosen_chars, self.rejected_chars, self.prompt_ids)
        lengths = [len(column) for column in columns if column is not None]
        if len(set(lengths)) > 1:
            raise ValueError(f"scores, characters and prompt ids of the pairs differ in number: {lengths}")


def reward_card(
    pairs: ScoredPairs, graded: Graded | None = None, confidence: float = 0.95, *, margin_scale: float = 1.0
) -> dict[str, Any]:
    """Return every figure of the module's list as one JSON-able dictionary.

    `graded` is (prompt ids, given grades, model scores), one entry a graded response. `margin_scale` turns a margin of
    scores into Bradley-Terry log-odds: 1 for the scores the model was trained with, its standard deviation for
    standardised ones.

    Raises ValueError for scores that are not finite, and for columns of graded responses of unequal length.
    """
    chosen, rejected = finite("chosen_scores", pairs.chosen_scores), finite("rejected_scores", pairs.rejected_scores)
    chars = np.asarray(pairs.chosen_chars, dtype=np.float64) - np.asarray(pairs.rejected_chars, dtype=np.float64)
    prompts = list(range(len(chosen))) if pairs.prompt_ids is None else pairs.prompt_ids
    card = _pair_figures(chosen - rejected, chars, prompts, confidence, margin_scale)
    undefined = card.pop("undefined")
    if graded is None or not len(graded[0]):
        figures: dict[str, Any] = dict.fromkeys(GRADED_FIGURES) | {"num_graded": 0, "num_graded_prompts": 0}
        undefined |= dict.fromkeys(GRADED_FIGURES, "no graded responses")
    else:
        figures = _graded_figures(*graded, confidence=confidence)
        undefined |= figures.pop("undefined")
    return card | figures | {"undefined": undefined}


def _with_bounds(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}{end}" for name in names for end in ("", "_low", "_high"))


GRADED_FIGURES = _with_bounds("spearman", "spearman_within", "kendall")
PAIR_FIGURES = (
    *_with_bounds("pairwise_accuracy", "longer_accuracy", "ece"),
    "ece_plugin",
    "mean_margin",
    "length_correlation",
)


def _pair_figures(
    margins: np.ndarray, chars: np.ndarray, prompts: Sequence[Hashable], confidence: float, margin_scale: float
) -> dict[str, Any]:
    if not len(margins):
        reasons = dict.fromkeys(PAIR_FIGURES, "no held-out pairs")
        return dict.fromkeys(PAIR_FIGURES) | {"num_heldout_pairs": 0, "undefined": reasons}
    figures: dict[str, Any] = {"num_heldout_pairs": len(margins)}
    for name, signs in (("pairwise_accuracy", np.sign(margins)), ("longer_accuracy", np.sign(chars))):
        right = (signs + 1.0) / 2.0
        figures |= {name: float(right.mean()), **bounds(name, grouped_share_interval(right, prompts, confidence))}
    figures |= calibration_error(margins, prompts, margin_scale=margin_scale, confidence=confidence)
    undefined: dict[str, str] = {}
    for name in ("pairwise_accuracy", "longer_accuracy", "ece"):
        undefined |= why_no_bounds(figures, name, too_few(len(set(prompts))))
    length = math.sqrt(float((margins**2).sum()) * float((chars**2).sum()))
    if not length:
        side = "every margin is 0" if not margins.any() else "both responses of every pair are equally long"
        undefined["length_correlation"] = side
    return figures | {
        "mean_margin": float(margins.mean()),
        "length_correlation": float((margins * chars).sum()) / length if length else None,
        "undefined": undefined,
    }


def _graded_figures(
    prompt_ids: Sequence[Hashable], given: Sequence[float], scores: Sequence[float], *, confidence: float
) -> dict[str, Any]:
    grades, values = finite("given grades", given), finite("model scores", scores)
    if not len(prompt_ids) == len(grades) == len(values):
        raise ValueError("prompt ids, grades and scores of the graded responses differ in number")
    num_prompts = len(set(prompt_ids))
    figures: dict[str, Any] = dict.fromkeys(GRADED_FIGURES)
    figures |= {"num_graded": len(grades), "num_graded_prompts": num_prompts}
    within, undefined = _within(prompt_ids, grades, values, confidence)
    rho = spearman(grades, values)
    if rho is None:
        constant = "given grades" if not np.ptp(grades) else "model scores"
        names = _with_bounds("spearman", "kendall")
        return figures | within | {"undefined": undefined | dict.fromkeys(names, f"the {constant} are constant")}
    of_rho, of_tau = rank_intervals(prompt_ids, grades, values, confidence)
    figures |= within | bounds("spearman", of_rho) | bounds("kendall", of_tau)
    figures |= {"spearman": rho, "kendall": float(kendalltau(grades, values, variant="b").statistic)}
    reason = too_few(num_prompts) or "without one of the prompts one side is constant"
    for name in ("spearman", "kendall"):
        undefined |= why_no_bounds(figures, name, reason)
    return figures | {"undefined": undefined}


def _within(
    prompt_ids: Sequence[Hashable], grades: np.ndarray, values: np.ndarray, confidence: float
) -> tuple[dict[str, float | None], dict[str, str]]:
    """`spearman_within` with its bounds, and why they are undefined."""
    rhos = spearman_within(prompt_ids, grades, values)
    known = [rho or 0.0 for rho in rhos] if any(rho is not None for rho in rhos) else []
    found: dict[str, float | None] = {"spearman_within": sum(known) / len(known) if known else None}
    found |= bounds("spearman_within", mean_interval(known, confidence))
    if not rhos:
        reason: str | None = "no prompt has two distinct grades"
    elif not known:
        reason = "the model gives every response of a prompt the same score"
    else:
        reason = too_few(len(known), "prompts with two distinct grades")
    undefined = why_no_bounds(found, "spearman_within", reason)
    return found, undefined | ({} if known else {"spearman_within": str(reason)})
