"""Rank correlations against SciPy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from rlhf_core.evaluation.ranks import spearman, spearman_within

ROWS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=30)


@given(ROWS)
def test_spearman_is_that_of_scipy(rows: list[tuple[int, int]]):
    one, other = (np.asarray(column) for column in zip(*rows, strict=True))
    rho = spearman(one, other)
    if len(set(one.tolist())) < 2 or len(set(other.tolist())) < 2:
        assert rho is None
    else:
        assert rho == pytest.approx(spearmanr(one, other).statistic, abs=1e-12)


def test_spearman_by_hand():
    # Rank differences 0, 1, -1, 0, 0: 1 - 6 * 2 / (5 * 24)
    assert spearman([1, 2, 3, 4, 5], [10, 30, 20, 40, 50]) == pytest.approx(0.9)


def test_within_speaks_of_prompts_that_have_two_grades():
    groups = ["a"] * 3 + ["b"] * 3 + ["c"] * 2
    assert spearman_within(groups, [1, 2, 3, 1, 2, 3, 5, 5], [1, 2, 3, 3, 2, 1, 8, 9]) == pytest.approx([1.0, -1.0])


def test_a_prompt_on_which_the_model_is_silent_has_no_rho():
    assert spearman_within(["a", "a", "b", "b"], [1, 2, 1, 2], [1, 2, 7, 7]) == [pytest.approx(1.0), None]
    assert spearman_within(["a", "a"], [1, 1], [1, 2]) == []


def test_nan_is_no_rank():
    """Sorting takes NaN for the largest: [1, 2, NaN] against [1, 2, 3] would be in perfect order."""
    with pytest.raises(ValueError, match=r"values\[2\] is nan"):
        spearman([1.0, 2.0, float("nan")], [1.0, 2.0, 3.0])
    assert spearman([], []) is None
