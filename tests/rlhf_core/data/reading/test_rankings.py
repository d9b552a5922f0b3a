"""Rankings: which choices they imply, by hand, and that the ranking can be read back from its pairs."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_core.data.batching.pair_table import implied_ranking
from rlhf_core.data.reading.rankings import is_ranked, ranked_choices, ranking_bounds, ranking_source, rankings_of


def test_every_pair_is_decided_by_the_ranks() -> None:
    found = list(ranked_choices(["x", "y", "z"], [2, 1, 2]))
    assert found == [("x", "y", "b"), ("x", "z", "tie"), ("y", "z", "a")]


def test_only_the_order_of_the_ranks_counts() -> None:
    texts = ["x", "y", "z", "w"]
    wanted = list(ranked_choices(texts, [1, 2, 2, 4]))
    assert list(ranked_choices(texts, [1, 2, 2, 3])) == wanted == list(ranked_choices(texts, [2, 5, 5, 9]))


def test_the_source_of_a_pair_names_its_rankings() -> None:
    source = ranking_source(["0a", "1b"])
    assert rankings_of(source) == ("0a", "1b")
    assert is_ranked(source)
    for other in ("file", "simulated", "graded", ""):
        assert rankings_of(other) == ()
        assert not is_ranked(other)


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError):
        list(ranked_choices(["x", "y"], [1]))


@given(st.integers(2, 9).flatmap(lambda count: st.permutations(range(1, count + 1))))
def test_the_ranking_is_read_back_from_its_pairs(ranking: list[int]) -> None:
    places = [str(place) for place in range(len(ranking))]
    choices = list(ranked_choices(places, ranking))
    assert len(choices) == len(ranking) * (len(ranking) - 1) // 2
    pairs = [(int(one), int(other)) if choice == "a" else (int(other), int(one)) for one, other, choice in choices]
    assert {frozenset(pair) for pair in pairs} == {frozenset(pair) for pair in combinations(range(len(ranking)), 2)}
    assert implied_ranking(pairs) == [ranking.index(rank) for rank in range(1, len(ranking) + 1)]


@pytest.mark.parametrize(
    ("responses", "ranking", "codes"),
    [
        (["x", "y"], [1, 2], set()),
        (["x", "y"], [7, 7], set()),
        (["x" * 9, "y"], [1, 2], set()),
        (["x" * 10, "y"], [1, 2], {"responses.long"}),
        (["x"], [1], {"responses.few"}),
        ([], [], {"responses.few"}),
        (["x", ""], [1, 2], {"responses.empty"}),
        (["x", "y"], [1], {"ranking.length"}),
        (["x", "y"], [1, 2, 3], {"ranking.length"}),
        (["x", "y"], [0, 1], {"ranking.value"}),
        (["x", "y"], [], {"ranking.length"}),
    ],
)
def test_what_is_sound(responses: list[str], ranking: list[int], codes: set[str]) -> None:
    bounds = {bound.code: bound for bound in ranking_bounds(9)}
    breached = set()
    for code, bound in bounds.items():
        number = bound.measure(responses, ranking)
        if (bound.least is not None and number < bound.least) or (bound.most is not None and number > bound.most):
            breached.add(code)
            assert bound.say(responses, ranking).startswith(code.split(".")[0])
    assert breached == codes
