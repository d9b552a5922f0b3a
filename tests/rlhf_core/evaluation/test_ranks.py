"""Rank correlations against SciPy, with weights standing for repeated rows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from rlhf_core.evaluation.ranks import mean_spearman_within, rank_levels, weighted_spearman

ROWS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 3)), min_size=2, max_size=30)


@given(ROWS)
def test_weights_are_repetitions(rows: list[tuple[int, int, int]]):
    first, second, weights = (np.asarray(column) for column in zip(*rows, strict=True))
    one, other = np.repeat(first, weights), np.repeat(second, weights)
    rho = weighted_spearman(rank_levels(first), rank_levels(second), weights)
    if len(set(one.tolist())) < 2 or len(set(other.tolist())) < 2:
        assert rho is None
    else:
        assert rho == pytest.approx(spearmanr(one, other).statistic, abs=1e-12)


def test_spearman_by_hand():
    levels = rank_levels([1, 2, 3, 4, 5])
    # Rank differences 0, 1, -1, 0, 0: 1 - 6 * 2 / (5 * 24)
    rho = weighted_spearman(levels, rank_levels([10, 30, 20, 40, 50]), np.ones(5, dtype=int))
    assert rho == pytest.approx(0.9)


def test_within_is_the_mean_over_prompts_that_have_two_grades():
    groups = ["a"] * 3 + ["b"] * 3 + ["c"] * 2
    value, count = mean_spearman_within(groups, [1, 2, 3, 1, 2, 3, 5, 5], [1, 2, 3, 3, 2, 1, 8, 9])
    assert (value, count) == (pytest.approx(0.0), 2)


def test_a_prompt_on_which_the_model_is_silent_counts_as_nought():
    value, count = mean_spearman_within(["a", "a", "b", "b"], [1, 2, 1, 2], [1, 2, 7, 7])
    assert (value, count) == (0.5, 2)


def test_within_is_undefined_without_grades_or_scores_to_rank():
    assert mean_spearman_within(["a", "a"], [1, 1], [1, 2]) == (None, 0)
    assert mean_spearman_within(["a", "a"], [1, 2], [7, 7]) == (None, 1)
