"""Intervals of chance-corrected agreement, over prompts: pairs on one prompt are easy or hard together.

Kappa and alpha are functions of the coincidence matrix (Krippendorff 2011), which is a sum over items: how often two
ratings of one item were c and k, each item's pairs counted by 1 / (its ratings - 1). So one pass over the votes gives
every figure without every block of prompts. `feedback.agreement` has the figures themselves; the tests hold the two
against each other.

Near full agreement there are too few disagreements to leave any out: then the interval is that of their share.

Shape suffixes: C = different ratings, in order; K = blocks of prompts.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from scipy.stats import beta

from rlhf_core.evaluation.intervals import MIN_GROUPS, Interval, grouped_share_interval, too_few
from rlhf_core.evaluation.jackknife import blocks_of, fisher_interval

MIN_ITEMS = 20
"""Fewest items: with fewer, one disagreement more or less moves kappa further than any interval foresees."""

OfMatrix = Callable[[np.ndarray], float | None]


def kappa_of(coincidences_CC: np.ndarray) -> float | None:
    """Fleiss' kappa from coincidences of items with equally many ratings; None where every rating is the same."""
    total = coincidences_CC.sum()
    expected = float(((coincidences_CC.sum(1) / total) ** 2).sum()) if total else 1.0
    observed = float(np.trace(coincidences_CC)) / total if total else 1.0
    return (observed - expected) / (1.0 - expected) if expected < 1.0 - 1e-12 else None


def alpha_of(coincidences_CC: np.ndarray) -> float | None:
    """Krippendorff's alpha, nominal metric; None where every rating is the same."""
    return _alpha(coincidences_CC, _distances(alpha_of, coincidences_CC))


def ordinal_alpha_of(coincidences_CC: np.ndarray) -> float | None:
    """Krippendorff's alpha with the ordinal metric; None where every rating is the same."""
    return _alpha(coincidences_CC, _distances(ordinal_alpha_of, coincidences_CC))


def _distances(figure: OfMatrix, coincidences_CC: np.ndarray) -> np.ndarray:
    """How far apart a figure takes two ratings to be, distances_CC: all alike, or by the ratings between them."""
    if figure is not ordinal_alpha_of:
        return 1.0 - np.eye(len(coincidences_CC))
    totals_C = coincidences_CC.sum(1)
    place_C = np.cumsum(totals_C) - totals_C / 2.0
    return np.asarray(np.subtract.outer(place_C, place_C) ** 2)


def _alpha(coincidences_CC: np.ndarray, distance_CC: np.ndarray) -> float | None:
    totals_C = coincidences_CC.sum(1)
    total = totals_C.sum()
    expected = float((np.outer(totals_C, totals_C) * distance_CC).sum())
    if not expected:
        return None
    return 1.0 - (total - 1.0) * float((coincidences_CC * distance_CC).sum()) / expected


def coincidences(items: Sequence[Sequence[Any]], blocks: np.ndarray) -> np.ndarray:
    """Return the coincidences_KCC of each block; items with a single rating say nothing and are left out."""
    place = {rating: number for number, rating in enumerate(sorted({rating for item in items for rating in item}))}
    kinds: dict[tuple[Any, ...], int] = {}
    kind_of = [kinds.setdefault(tuple(sorted(item)), len(kinds)) for item in items]
    of_kind = np.zeros((len(kinds), len(place), len(place)))
    for ratings, number in kinds.items():
        counts = Counter(ratings)
        for one, times in counts.items() if len(ratings) > 1 else ():
            for other, again in counts.items():
                pairs = times * (again - (one == other))
                of_kind[number, place[one], place[other]] = pairs / (len(ratings) - 1)
    held = np.zeros((int(blocks.max()) + 1, len(kinds)))
    np.add.at(held, (blocks, np.array(kind_of)), 1.0)
    return np.einsum("kn,ncd->kcd", held, of_kind)


def agreement_intervals(
    groups: Sequence[Hashable],
    items: Sequence[Sequence[Any]],
    figures: Mapping[str, OfMatrix],
    confidence: float = 0.95,
) -> dict[str, Interval | None]:
    """Return the interval of each figure.

    Args:
        groups: the prompt of each item.
        items: the ratings of each item, of a kind that can be sorted.
        figures: name -> figure of a coincidence matrix.

    Returns:
        None where `why_no_interval` says so, or where the figure is undefined, also without one of the groups.
    """
    if why_no_interval(groups):
        return dict.fromkeys(figures)
    by_block = coincidences(items, blocks_of(groups))
    together = by_block.sum(0)
    disagreeing = sum(float(block.sum() - np.trace(block)) > 1e-9 for block in by_block)
    found: dict[str, Interval | None] = {}
    for name, figure in figures.items():
        estimate = figure(together)
        if estimate is None:
            found[name] = None
        elif disagreeing < MIN_GROUPS:
            found[name] = _by_share(figure, estimate, together, items, groups, confidence)
        else:
            without = [figure(together - one) for one in by_block]
            found[name] = fisher_interval(estimate, without, confidence, step=1.0 / len(items) ** 2)
    return found


def _by_share(
    figure: OfMatrix,
    estimate: float,
    together_CC: np.ndarray,
    items: Sequence[Sequence[Any]],
    groups: Sequence[Hashable],
    confidence: float,
) -> Interval | None:
    """The interval where fewer than `MIN_GROUPS` blocks hold any disagreement: that of its share over prompts.

    Every figure is 1 - observed / expected disagreement. What is expected is taken as known; of what is observed there
    is so little that its own interval (`grouped_share_interval`) is all that counts. One disagreement in 200 pairs,
    left out, would move Fisher's z by more than the whole scale is worth. Wilson's lower end of a share is too high
    where one event was seen (Brown, Cai and DasGupta 2001, section 4.1): it is that of Jeffreys at most.
    """
    distances_CC = _distances(figure, together_CC)
    distances_CC = distances_CC / distances_CC.max()
    totals_C = together_CC.sum(1)
    chance_CC = np.outer(totals_C, totals_C) / totals_C.sum()
    by_chance = figure(chance_CC)
    place = {rating: number for number, rating in enumerate(sorted({rating for item in items for rating in item}))}
    apart, of = [], []
    for item, group in zip(items, groups, strict=True):
        pairs = [float(distances_CC[place[one], place[other]]) for one, other in combinations(item, 2)]
        if pairs:
            apart.append(sum(pairs) / len(pairs))
            of.append(group)
    share = grouped_share_interval(apart, of, confidence)
    if share is None or by_chance is None:
        return None
    expected = float((chance_CC * distances_CC).sum() / totals_C.sum()) / (1.0 - by_chance)
    seen = sum(apart)
    least = float(beta.ppf((1.0 - confidence) / 2.0, seen + 0.5, len(apart) - seen + 0.5)) if seen else 0.0
    low, high = 1.0 - share[1] / expected, 1.0 - min(share[0], least) / expected
    return max(-1.0, min(low, estimate)), max(high, estimate)


def why_no_interval(groups: Sequence[Hashable]) -> str | None:
    """The reason, where groups or items are too few."""
    return too_few(len(set(groups))) or too_few(len(groups), "pairs", MIN_ITEMS)
