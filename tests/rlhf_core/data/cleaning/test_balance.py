"""Thinning keeps labels, knows no order of rows, and says so where it cannot be done."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_core.data.cleaning.balance import (
    balance_lengths,
    balance_tasks,
    cap_per_prompt,
    mean_length_difference,
    share_longer_chosen,
)
from rlhf_core.data.cleaning.labelled import Preference, to_preference, without_contradictions, without_equal
from rlhf_core.data.reading.rankings import ranking_source
from rlhf_core.errors import DataError
from rlhf_core.text.identity import prompt_group


def row(number, prompt="p", a="x", b="y", label="a", margin=1.0, votes=3, task="t", source="file"):
    return {
        "pair_id": str(number),
        "prompt_id": "id",
        "prompt": prompt,
        "task": task,
        "split": "train",
        "response_a": a,
        "response_b": b,
        "label": label,
        "num_votes": votes,
        "agreement": 1.0,
        "margin": margin,
        "source": source,
    }


def preference(number, **fields):
    found = to_preference(row(number, **fields))
    assert found is not None
    return found


pairs = st.lists(
    st.tuples(
        st.sampled_from("pqr"),
        st.text("x", min_size=1, max_size=6),
        st.text("y", min_size=1, max_size=6),
        st.sampled_from("ab"),
        st.integers(0, 3),
        st.sampled_from(["t", "u", "v"]),
    ),
    max_size=30,
).map(lambda rows: [
    preference(i, prompt=p, a=a, b=b, label=label, margin=float(m), task=task)
    for i, (p, a, b, label, m, task) in enumerate(rows)
])  # fmt: skip


def test_a_label_says_which_response_is_chosen_and_a_tie_nothing():
    assert (preference(1).chosen, preference(1).rejected) == ("x", "y")
    assert (preference(1, label="b").chosen, preference(1, label="b").rejected) == ("y", "x")
    assert to_preference(row(1, label="tie")) is None
    assert preference(1, prompt="A  b").group == prompt_group("a B")


def test_responses_that_differ_in_form_only_are_left_out():
    same, other = preference(1, a="Caf\u00e9 here", b=" cafe\u0301  HERE"), preference(2, a="x", b="x.")
    assert without_equal([same, other]) == [other]


@pytest.mark.parametrize(
    ("strengths", "kept"),
    [
        ([("a", 2.0, 3), ("b", 1.0, 3)], {"0"}),
        ([("a", 1.0, 3), ("b", 1.0, 3)], set()),
        ([("a", 1.0, 1), ("b", 1.0, 3)], {"1"}),
        ([("a", 1.0, 3), ("b", 1.0, 2), ("b", 1.0, 2)], {"1", "2"}),
        ([("a", 0.0, 3), ("b", 0.0, 3)], set()),
    ],
)
def test_contradictions_go_to_the_stronger_side(strengths, kept):
    rows = [preference(i, label=label, margin=m, votes=n) for i, (label, m, n) in enumerate(strengths)]
    other = preference(9, prompt="another")
    assert {pair.pair_id for pair in without_contradictions([*rows, other])} == kept | {"9"}


def test_contradictions_are_seen_through_case_and_white_space():
    first, second = preference(1, a="Yes", b="No"), preference(2, prompt=" P", a="no", b="yes ")
    assert without_contradictions([first, second]) == []


def test_the_cap_draws_among_the_pairs_of_a_prompt_whatever_their_strength():
    """Where sure labels are those of longer responses, as in real data, the surest ones would be 100 % longer."""
    rows = [
        preference(
            i, prompt=f"{'p' if i % 2 else 'P '} {i // 12}", a="xxx" if i % 4 else "x", b="yy", margin=float(i % 4)
        )
        for i in range(2400)
    ]
    kept = cap_per_prompt(rows, 3)
    assert set(Counter(pair.group for pair in kept).values()) == {3}
    # 600 drawn of which 0.75 are longer: four standard errors
    assert share_longer_chosen(kept) == pytest.approx(0.75, abs=0.07)
    assert cap_per_prompt(random.Random(0).sample(rows, len(rows)), 3) == kept


def test_the_cap_leaves_rankings_whole():
    ranked = [preference(i, source=ranking_source(["r1"])) for i in range(4)]
    loose = [preference(i, margin=i / 10) for i in range(5, 8)]
    kept = {pair.pair_id for pair in cap_per_prompt([*ranked, *loose], 1)}
    assert kept > {"0", "1", "2", "3"}
    assert len(kept) == 5


def test_tasks_are_thinned_to_the_ratio():
    rows = [preference(i, task="t" if i < 20 else "u") for i in range(24)]
    assert Counter(pair.task for pair in balance_tasks(rows, 2.5)) == {"t": 10, "u": 4}
    assert Counter(pair.task for pair in balance_tasks(rows, 1.0)) == {"t": 4, "u": 4}
    assert len(balance_tasks(rows, 5.0)) == 24


def test_what_cannot_be_balanced_says_why():
    with pytest.raises(DataError, match=r"cannot balance: all 1 pairs have task 't'\. Fix"):
        balance_tasks([preference(1)], 2.0)
    with pytest.raises(DataError, match="cannot balance: there are no pairs"):
        balance_tasks([], 2.0)
    with pytest.raises(DataError, match="cannot balance: no pair of 1 has the shorter response chosen"):
        balance_lengths([preference(1, a="xxx")])
    with pytest.raises(DataError, match="has the longer response chosen"):
        balance_lengths([preference(1, b="yyy")])


def test_lengths_are_balanced_by_leaving_out_not_by_turning_round():
    rows = [preference(i, a="x" * (3 if i < 15 else 1), b="yy" if i < 20 else "y") for i in range(23)]
    kept = balance_lengths(rows)
    assert share_longer_chosen(kept) == 0.5
    assert mean_length_difference(kept) == 0.0
    assert len(kept) == 5 + 5 + 3
    assert set(kept) <= set(rows)


def test_lengths_of_no_pairs_are_undefined_and_equal_ones_count_half():
    assert share_longer_chosen([]) is None
    assert mean_length_difference([]) is None
    rows = [preference(1, a="xxx"), preference(2)]
    assert share_longer_chosen(rows) == 0.75
    assert mean_length_difference(rows) == 1.0


@given(rows=pairs, seed=st.integers(0, 5), most=st.integers(1, 4))
def test_order_changes_nothing_and_labels_stay(rows, seed, most):
    shuffled = random.Random(seed).sample(rows, len(rows))

    def attempt(rule, some) -> set[Preference] | str:
        try:
            return set(rule(some))
        except DataError as error:
            return str(error)

    rules = (
        lambda some: cap_per_prompt(some, most),
        lambda some: balance_tasks(some, 1.5),
        balance_lengths,
        without_contradictions,
    )
    for rule in rules:
        kept = attempt(rule, rows)
        assert kept == attempt(rule, shuffled)
        if isinstance(kept, set):
            assert kept <= set(rows)
    assert max(Counter(pair.group for pair in cap_per_prompt(rows, most)).values(), default=0) <= most


@given(rows=pairs)
def test_balanced_lengths_are_balanced(rows):
    longer = sum(pair.length_difference > 0 for pair in rows)
    shorter = sum(pair.length_difference < 0 for pair in rows)
    if longer and shorter:
        kept = balance_lengths(rows)
        assert share_longer_chosen(kept) == 0.5
        assert len(kept) == len(rows) - abs(longer - shorter)
