"""Pairs as tensors, and the rankings they imply."""

from itertools import combinations, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_core.data.batching.pair_table import implied_ranking, pair_table, rankings_apart
from rlhf_core.data.batching.pairs import PairLabel, PreferenceGroup, PreferencePair, encode_pairs, group_pairs
from rlhf_core.data.reading.rankings import ranking_source
from rlhf_core.text.tokenizer import train_tokenizer


def test_pairs_of_all_groups_stand_in_one_table() -> None:
    groups = group_pairs(
        [
            PreferencePair(prompt=[7], chosen=[1], rejected=[2], label=PairLabel(agreement=0.6, margin=2.0)),
            PreferencePair(prompt=[8], chosen=[3], rejected=[4], label=PairLabel(criterion="harmless", margin=0.5)),
            PreferencePair(prompt=[8], chosen=[4], rejected=[5], label=PairLabel(margin=0.0, tie=True)),
            PreferencePair(prompt=[8], chosen=[4], rejected=[3], label=PairLabel(criterion="other")),
        ]
    )
    table = pair_table(groups, ["overall", "harmless"])
    assert len(table) == 3
    assert table.chosen_N.tolist() == [0, 2, 3]
    assert table.rejected_N.tolist() == [1, 3, 4]
    assert table.group_N.tolist() == [0, 1, 1]
    assert table.criterion_N.tolist() == [0, 1, 0]
    assert table.agreement_N.tolist() == pytest.approx([0.6, 1.0, 1.0])
    assert table.margin_N.tolist() == [2.0, 0.5, 0.0]
    assert table.tie_N.tolist() == [False, False, True]
    assert table.rows(table.criterion_N == 0).chosen_N.tolist() == [0, 3]


def test_pairs_without_labels_count_as_plain_ones() -> None:
    group = PreferenceGroup(prompt=[7], responses=[[1], [2], [3]], pairs=[(0, 1), (0, 2)])
    assert group.labels == [PairLabel(), PairLabel()]


def test_rankings_of_one_prompt_are_kept_apart_from_rows_to_tensors() -> None:
    """x > y stands in both rankings of the first prompt, u > v in none; the second prompt has none either."""
    rows = [
        {"prompt": prompt, "chosen": better, "rejected": worse, "source": source}
        for prompt, better, worse, source in [
            ("ask", "x", "y", ranking_source(["r1", "r2"])),
            ("ask", "y", "z", ranking_source(["r1"])),
            ("ask", "u", "v", "file"),
            ("ask", "y", "w", ranking_source(["r2"])),
            ("tell", "x", "y", "simulated"),
        ]
    ]
    tokenizer = train_tokenizer(["ask tell"], 300)
    pairs = encode_pairs(tokenizer, rows, max_prompt_tokens=9, max_response_tokens=9)
    assert [pair.label.rankings for pair in pairs] == [("r1", "r2"), ("r1",), (), ("r2",), ()]
    table = pair_table(group_pairs(pairs), ["overall"])
    assert table.rankings_NL.tolist() == [[0, 1], [0, -1], [-1, -1], [1, -1], [-1, -1]]
    apart, share_U = rankings_apart(table)
    found = [
        list(zip(own.chosen_N.tolist(), own.rejected_N.tolist(), strict=True))
        for own in (apart.rows(apart.group_N == number) for number in range(4))
    ]
    assert found == [[(3, 4)], [(0, 1), (1, 2)], [(0, 1), (1, 5)], [(6, 7)]]
    assert share_U.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1.0])
    assert table.rankings_NL.tolist()[2] == [-1, -1], "the table itself stays as it was"


@pytest.mark.parametrize(
    ("pairs", "ranking"),
    [
        ([(2, 0)], [2, 0]),
        ([(2, 0), (0, 1)], [2, 0, 1]),  # the third pair follows from the other two
        ([(2, 0), (2, 1)], None),  # 0 and 1 were not compared
        ([(0, 1), (1, 2), (2, 0)], None),  # a circle
        ([(0, 1), (1, 0)], None),
        ([(0, 1), (2, 3)], None),
        ([], None),
    ],
)
def test_rankings_by_hand(pairs: list[tuple[int, int]], ranking: list[int] | None) -> None:
    assert implied_ranking(pairs) == ranking


@given(
    st.integers(2, 5).flatmap(lambda count: st.sets(st.sampled_from(list(permutations(range(count), 2))), min_size=1))
)
def test_a_ranking_is_implied_if_it_is_the_only_order_that_agrees(pairs: set[tuple[int, int]]) -> None:
    items = sorted({item for pair in pairs for item in pair})
    agreeing = [list(order) for order in permutations(items) if pairs <= set(combinations(order, 2))]
    assert implied_ranking(sorted(pairs)) == (agreeing[0] if len(agreeing) == 1 else None)
