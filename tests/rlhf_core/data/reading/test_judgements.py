"""Repeated judgements are votes, a named annotator's last one counts, and what stands twice is a duplicate: by hand."""

import random
from itertools import permutations

import pytest

from rlhf_core.data.reading.judgements import ITEMS, RESPONSES, pair_names, repeats, texts_of
from rlhf_core.data.reading.kinds import SPECS
from rlhf_core.data.reading.readers import Row
from rlhf_core.data.reading.records import to_record

VOTE = {"prompt": "p", "response_a": "x", "response_b": "y", "annotator": "kim", "choice": "a"}
COMPARISON = {"prompt": "p", "chosen": "x", "rejected": "y"}
TURNED = {"prompt": "p", "chosen": "y", "rejected": "x"}
RANKING = {"prompt": "p", "responses": ["x", "y", "z"], "ranking": [1, 2, 3]}
GRADE = {"prompt": "p", "response": "x", "score": 3}
DEMONSTRATION = {"prompt": "p", "response": "x"}


def found(kind, *rows):
    """For each row that does not count: why, and the number of the row that counts instead (from 0)."""
    records = [to_record(kind, Row(line=number, sha256="", value=row)) for number, row in enumerate(rows)]
    return {position: (repeat.why, repeat.other.line) for position, repeat in repeats(kind, records).items()}


def test_every_kind_holds_items_or_judgements():
    assert ITEMS.keys() | RESPONSES.keys() == SPECS.keys()
    assert not ITEMS.keys() & RESPONSES.keys()
    for kind, names in {**ITEMS, **RESPONSES}.items():
        assert set(names) <= set(SPECS[kind])


@pytest.mark.parametrize("choices", [*permutations(["a", "b", "tie"]), ("a", "b", "a"), ("b", "a", "b", "a")])
def test_the_last_vote_of_an_annotator_counts_in_whatever_order_opinions_change(choices):
    rows = [VOTE | {"choice": choice} for choice in choices]
    assert set(range(len(rows))) - found("votes", *rows).keys() == {len(rows) - 1}


def test_the_last_vote_counts_also_when_the_pair_is_shown_the_other_way_round():
    turned = VOTE | {"response_a": "y", "response_b": "x"}
    assert found("votes", VOTE, turned) == {0: ("revised", 1)}
    assert found("votes", VOTE, turned | {"choice": "b"}) == {1: ("duplicate", 0)}, "x is chosen both times"
    assert found("votes", VOTE, VOTE | {"strength": 4}) == {0: ("revised", 1)}
    assert found("votes", VOTE | {"choice": "tie"}, VOTE | {"choice": "tie", "strength": 4}) == {1: ("duplicate", 0)}


DISGUISES = [
    "\n\nHuman: Where is it?\n\nAssistant:",
    "Where  is it?",
    "Where is\u200b it?",
    [{"role": "user", "content": "Where is it?"}],
]


@pytest.mark.parametrize("prompt", DISGUISES)
@pytest.mark.parametrize(
    ("kind", "row", "contrary"),
    [
        ("votes", VOTE, {"choice": "b"}),
        ("comparisons", COMPARISON | {"annotator": "kim"}, {"chosen": "y", "rejected": "x"}),
        ("rankings", RANKING | {"annotator": "kim"}, {"ranking": [3, 2, 1]}),
        ("graded", GRADE | {"annotator": "kim"}, {"score": 1}),
    ],
)
def test_the_last_judgement_counts_also_when_the_prompt_is_written_in_another_way(kind, row, contrary, prompt):
    first = row | {"prompt": "Where is it?"}
    assert found(kind, first, first | contrary | {"prompt": prompt}) == {0: ("revised", 1)}
    assert found(kind, first | {"prompt": prompt}, first | contrary) == {0: ("revised", 1)}
    assert found(kind, first, first | contrary | {"prompt": "Where was it?"}) == {}


def test_other_annotators_criteria_and_pair_ids_are_other_votes():
    others = [{"annotator": "lee"}, {"criterion": "tone"}, {"response_b": "z"}, {"prompt": "q"}]
    assert found("votes", VOTE, *(VOTE | {"choice": "b"} | change for change in others)) == {}
    assert found("votes", VOTE | {"pair_id": "1"}, VOTE | {"pair_id": "2", "choice": "b"}) == {}, "pair_id tells pairs"


def test_pair_id_joins_texts_that_differ_in_white_space_and_nothing_more():
    first = VOTE | {"pair_id": "1"}
    assert found("votes", first, first | {"prompt": " p ", "choice": "b"}) == {0: ("revised", 1)}
    for disguise in (" p ", "\n\nHuman: p\n\nAssistant:"):
        assert found("votes", first, first | {"prompt": disguise, "annotator": "lee"}) == {}
    assert found("votes", first, first | {"response_b": "z", "annotator": "lee"}) == {1: ("taken", 0)}


def test_a_vote_without_pair_id_joins_the_pair_of_its_texts():
    rows = [VOTE, VOTE | {"pair_id": "1", "choice": "b"}, VOTE | {"choice": "tie"}]
    assert found("votes", *rows) == {0: ("revised", 1), 1: ("revised", 2)}
    values = [to_record("votes", Row(line=1, sha256="", value=row)).values for row in rows]
    assert pair_names(values) == {texts_of("votes", values[0]): "1"}


@pytest.mark.parametrize(
    ("kind", "row", "contrary"),
    [
        ("comparisons", COMPARISON, TURNED),
        ("rankings", RANKING, RANKING | {"ranking": [3, 2, 1]}),
        ("graded", GRADE, GRADE | {"score": 1}),
    ],
)
def test_judgements_of_nobody_in_particular_are_votes_unless_an_id_says_that_they_are_one_row(kind, row, contrary):
    assert found(kind, row, row, row, contrary) == {}
    assert found(kind, *(row | {"id": name} for name in "123"), contrary | {"id": "4"}) == {}
    named = row | {"id": "1"}
    assert found(kind, named, named, row) == {1: ("duplicate", 0)}, "the same upload twice, and somebody else's row"
    assert found(kind, named, contrary | {"id": "1"}) == {1: ("taken", 0)}, "an id says one thing"
    for who in ("kim", "lee"):
        named = row | {"annotator": who}
        assert found(kind, named, contrary | {"annotator": who}) == {0: ("revised", 1)}
        assert found(kind, named, named) == {1: ("duplicate", 0)}
    several = [row | {"annotator": "kim", "id": "1"}, contrary | {"annotator": "lee", "id": "1"}]
    assert found(kind, *several) == {}, "an id may stand for what several people judged"


def test_the_last_ranking_counts_whatever_order_its_responses_stand_in():
    ranking = RANKING | {"annotator": "kim"}
    assert found("rankings", ranking, ranking | {"responses": ["z", "y", "x"]}) == {0: ("revised", 1)}
    assert found("rankings", ranking, ranking | {"responses": ["z", "y", "x"], "ranking": [3, 2, 1]}) == {
        1: ("duplicate", 0)
    }
    assert found("rankings", ranking, ranking | {"responses": ["x", "y", "w"]}) == {}


def test_items_that_stand_twice_are_duplicates():
    assert found("demonstrations", DEMONSTRATION, DEMONSTRATION | {"task": "t"}, DEMONSTRATION | {"response": "y"}) == {
        1: ("duplicate", 0)
    }
    assert found("prompts", "p", "q", "p") == {2: ("duplicate", 0)}
    named = DEMONSTRATION | {"id": "1"}
    assert found("demonstrations", named, named, named | {"response": "y"}) == {1: ("duplicate", 0), 2: ("taken", 0)}


def test_what_counts_is_each_annotators_last_word_in_any_long_file():
    """Against a plain model: a dictionary that is written over, row by row."""
    rng = random.Random(0)
    rows = [
        VOTE | {"annotator": rng.choice("kln"), "choice": rng.choice("ab"), "prompt": rng.choice("pqr")}
        for _ in range(300)
    ]
    last = {(row["annotator"], row["prompt"]): row["choice"] for row in rows}
    left = found("votes", *rows)
    kept = [row for number, row in enumerate(rows) if number not in left]
    assert {(row["annotator"], row["prompt"]): row["choice"] for row in kept} == last
    assert len(kept) == len(last)
