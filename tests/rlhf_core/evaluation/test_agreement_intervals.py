"""Intervals of agreement: figures of coincidence matrices against those from ratings, and how often they hold."""

import random

import numpy as np
import pytest

from rlhf_core.data.agreement import fleiss_kappa, krippendorff_alpha, ordinal_alpha
from rlhf_core.evaluation.agreement_intervals import (
    agreement_intervals,
    alpha_of,
    coincidences,
    kappa_of,
    ordinal_alpha_of,
    why_no_interval,
)

FIGURES = {"kappa": kappa_of, "alpha": alpha_of, "ordinal": ordinal_alpha_of}


def ratings(seed: int, prompts: int, each: int, raters: int, right: float) -> tuple[list[int], list[list[int]]]:
    """Votes of raters who are right with a chance that depends on the prompt."""
    rng = random.Random(seed)
    groups, items = [], []
    for prompt in range(prompts):
        chance = right + rng.uniform(-0.1, 0.1)
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
    assert low > 0.9
    assert agreement_intervals(range(30), [[1, 1, 1]] * 30, FIGURES) == dict.fromkeys(FIGURES)
