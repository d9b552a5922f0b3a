"""Intervals of agreement: figures of coincidence matrices against those from ratings, and how often they hold."""

import random

import numpy as np
import pytest
from statsmodels.stats.proportion import proportion_confint

from rlhf_core.evaluation.agreement_intervals import (
    agreement_intervals,
    alpha_of,
    coincidences,
    kappa_of,
    ordinal_alpha_of,
    why_no_interval,
)
from rlhf_core.feedback.agreement import fleiss_kappa, krippendorff_alpha, ordinal_alpha

FIGURES = {"kappa": kappa_of, "alpha": alpha_of, "ordinal": ordinal_alpha_of}


def ratings(
    seed: int, prompts: int, each: int, raters: int, right: float, spread: float = 0.1
) -> tuple[list[int], list[list[int]]]:
    """Votes of raters who are right with a chance that depends on the prompt."""
    rng = random.Random(seed)
    groups, items = [], []
    for prompt in range(prompts):
        chance = right + rng.uniform(-spread, spread)
        for _ in range(each):
            truth = rng.choice((0, 2))
            groups.append(prompt)
            items.append([truth if rng.random() < chance else rng.choice((1, 2 - truth)) for _ in range(raters)])
    return groups, items


def test_coincidences_give_the_figures_that_ratings_give():
    _, items = ratings(3, 12, 5, 4, 0.7)
    matrix = coincidences(items, np.zeros(len(items), dtype=int)).sum(0)
    assert kappa_of(matrix) == pytest.approx(fleiss_kappa(items), abs=1e-12)
    assert alpha_of(matrix) == pytest.approx(krippendorff_alpha(items), abs=1e-12)
    assert ordinal_alpha_of(matrix) == pytest.approx(ordinal_alpha(items), abs=1e-12)
    uneven = [[*items[0], 1], [2], *items[1:]]
    matrix = coincidences(uneven, np.zeros(len(uneven), dtype=int)).sum(0)
    assert alpha_of(matrix) == pytest.approx(krippendorff_alpha(uneven), abs=1e-12)
    assert ordinal_alpha_of(matrix) == pytest.approx(ordinal_alpha(uneven), abs=1e-12)


def test_without_a_block_means_without_its_items():
    groups, items = ratings(5, 8, 3, 3, 0.8)
    blocks = np.array(groups)
    by_block = coincidences(items, blocks)
    kept = [item for item, group in zip(items, groups, strict=True) if group != 2]
    assert alpha_of(by_block.sum(0) - by_block[2]) == pytest.approx(krippendorff_alpha(kept), abs=1e-12)


@pytest.mark.parametrize(("prompts", "each"), [(5, 4), (10, 4), (30, 3)])
def test_intervals_hold_the_truth_as_often_as_they_say(prompts: int, each: int):
    _, many = ratings(0, 6_000, each, 3, 0.8)
    matrix = coincidences(many, np.zeros(len(many), dtype=int)).sum(0)
    truth = {name: figure(matrix) for name, figure in FIGURES.items()}
    hits = dict.fromkeys(FIGURES, 0)
    for seed in range(1, 501):
        found = agreement_intervals(*ratings(seed, prompts, each, 3, 0.8), FIGURES)
        for name, interval in found.items():
            hits[name] += interval is not None and interval[0] <= truth[name] <= interval[1]
    assert all(0.925 <= hit / 500 <= 0.985 for hit in hits.values()), hits


@pytest.mark.parametrize(("prompts", "each"), [(5, 4), (20, 1), (60, 1)])
def test_near_full_agreement_intervals_hold_the_truth_too(prompts: int, each: int):
    """Two raters who err in 0.5 to 5 of 100 pairs, so that many rounds show no disagreement, or one.

    The mean over the truths, since counts are few and whole (as in `benchmarks.coverage`).
    """
    hits, runs = dict.fromkeys(FIGURES, 0), 0
    for right in (0.95, 0.97, 0.985, 0.995):
        _, many = ratings(0, 6_000, each, 2, right, 0.004)
        matrix = coincidences(many, np.zeros(len(many), dtype=int)).sum(0)
        truth = {name: figure(matrix) for name, figure in FIGURES.items()}
        for seed in range(1, 101):
            runs += 1
            found = agreement_intervals(*ratings(seed, prompts, each, 2, right, 0.004), FIGURES)
            for name, interval in found.items():
                hits[name] += interval is not None and interval[0] <= truth[name] <= interval[1]
    assert all(hit / runs >= 0.93 for hit in hits.values()), hits


def test_one_disagreement_in_two_hundred_pairs_is_told_by_its_share():
    """Kappa .99, and Fisher's z without that pair infinite. By hand: shares of 1 in 200 over chance's one half."""
    items = [[0, 0], [2, 2]] * 99 + [[0, 0], [0, 2]]
    found = agreement_intervals(range(200), items, FIGURES)
    rarest = proportion_confint(1, 200, method="jeffreys")[0]
    commonest = proportion_confint(1, 200, method="wilson")[1]
    for name in FIGURES:
        low, high = found[name]
        assert (low, high) == pytest.approx((1 - commonest / 0.5, 1 - rarest / 0.5), abs=0.001), name


def test_too_few_prompts_or_pairs_give_none_and_say_so():
    groups, items = ratings(1, 4, 8, 3, 0.8)
    assert agreement_intervals(groups, items, FIGURES) == dict.fromkeys(FIGURES)
    assert why_no_interval(groups) == "too few prompts: 4, an interval needs 5"
    assert why_no_interval(range(19)) == "too few pairs: 19, an interval needs 20"
    assert why_no_interval(range(20)) is None


def test_full_agreement_ends_at_one_and_a_single_answer_is_undefined():
    items = [[0, 0, 0], [2, 2, 2]] * 15
    (low, high) = agreement_intervals(range(30), items, {"alpha": alpha_of})["alpha"]
    assert high == 1.0
    assert low == pytest.approx(1 - 2 * proportion_confint(0, 30, method="wilson")[1], abs=0.01)
    assert agreement_intervals(range(30), [[1, 1, 1]] * 30, FIGURES) == dict.fromkeys(FIGURES)
