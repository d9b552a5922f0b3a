"""Rows in every accepted form end in one form; what does not fit is noted, and nothing is raised."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_core.data.fields import RIGHT_TYPE
from rlhf_core.data.kinds import SPECS
from rlhf_core.data.readers import Row
from rlhf_core.data.records import to_record

CHOSEN = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: How are you?\n\nAssistant: Well. "
REJECTED = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: How are you?\n\nAssistant: Go away."
PROMPT = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: How are you?\n\nAssistant:"
VOTE = {"prompt": "p", "response_a": "x", "response_b": "y", "annotator": "anna", "choice": "a"}


def record(kind, value, *, textual=False):
    return to_record(kind, Row(line=7, sha256="0" * 64, value=value, textual=textual))


def messages(*contents, system=None):
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def test_fields_keep_their_values_and_responses_lose_white_space_at_their_ends():
    found = record("demonstrations", {"prompt": " p\n", "response": "\n r ", "id": 12, "more": 1})
    assert found.values == {"id": "12", "prompt": " p\n", "response": "r", "task": "", "source": "file"}
    assert set(found.types.values()) == {RIGHT_TYPE}
    assert found.unknown == {"more"}
    assert found.line == 7


def test_question_and_answer_are_prompt_and_response():
    values = record("demonstrations", {"question": "q", "answer": "a"}).values
    assert (values["prompt"], values["response"]) == ("q", "a")
    assert record("comparisons", {"question": "q", "chosen": "c", "rejected": "r"}).values["prompt"] == "q"


def test_a_prompt_may_be_a_bare_text():
    assert record("prompts", "How?").values["prompt"] == "How?"
    assert "this is text" in record("votes", "How?").problem


def test_two_transcripts_become_a_prompt_and_two_responses():
    found = record("comparisons", {"chosen": CHOSEN, "rejected": REJECTED})
    assert (found.values["prompt"], found.values["chosen"], found.values["rejected"]) == (PROMPT, "Well.", "Go away.")
    assert not found.parts_early
    assert found.alternates


def test_transcripts_that_part_early_and_turns_that_do_not_alternate_are_noted():
    other = CHOSEN.replace("Hello", "Hullo")
    assert record("comparisons", {"chosen": other, "rejected": REJECTED}).parts_early
    twice = {
        "chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c",
        "rejected": "\n\nHuman: a\n\nHuman: b\n\nAssistant: d",
    }
    assert not record("comparisons", twice).alternates
    assert not record("comparisons", twice).parts_early


def test_the_human_speaks_first():
    first = {"chosen": "\n\nAssistant: Hi\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nAssistant: c"}
    found = record("comparisons", first)
    assert not found.alternates
    assert found.parts_early


def test_an_empty_last_turn_is_an_empty_response():
    found = record("comparisons", {"chosen": PROMPT, "rejected": REJECTED})
    assert found.values["chosen"] == ""
    assert found.types["chosen"] == RIGHT_TYPE
    assert not found.parts_early


def test_a_transcript_that_the_human_ends_has_no_response():
    value = {"chosen": CHOSEN + "\n\nHuman: And?", "rejected": REJECTED}
    assert record("comparisons", value).problem == "chosen: the last turn is not the assistant's"


def test_texts_that_only_look_like_transcripts_stay_with_their_prompt():
    found = record("comparisons", {"prompt": "p", "chosen": CHOSEN, "rejected": "r"})
    assert (found.values["prompt"], found.values["chosen"]) == ("p", CHOSEN.strip())


def test_messages_are_rendered_as_a_transcript():
    found = record("demonstrations", {"messages": messages("Hi", "Hello", "How are you?", " Well.", system="Be kind.")})
    assert found.values["prompt"] == "Be kind." + PROMPT
    assert found.values["response"] == "Well."
    assert found.alternates
    pair = {"chosen": messages("Hi", "yes"), "rejected": messages("Hi", "no")}
    assert record("comparisons", pair).values["prompt"] == "\n\nHuman: Hi\n\nAssistant:"


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ([], "the last of at least two messages must be the assistant's"),
        (messages("Hi"), "the last of at least two messages must be the assistant's"),
        ([{"role": "assistant", "content": "Hi"}], "the last of at least two messages"),
        ([*messages("Hi"), {"role": "tool", "content": "x"}], "message 2 has role 'tool'"),
        ([*messages("Hi"), {"role": "system", "content": "x"}], "message 2 has role 'system', which only the first"),
        (messages(" ", "x"), "message 1 is empty"),
        ([{"role": "user"}, "x"], "message 1 is not an object"),
        ([{"role": "user", "content": None}], "message 1 is not an object"),
    ],
)
def test_messages_of_another_form_are_a_problem(value, problem):
    assert problem in record("demonstrations", {"messages": value}).problem


@pytest.mark.parametrize(
    ("value", "found"),
    [(True, "boolean"), (None, "null"), (3, "number"), ({"x": 1}, "object")],
)
def test_a_value_of_the_wrong_type_is_null_beside_what_it_was(value, found):
    got = record("comparisons", {"prompt": "p", "chosen": value, "rejected": "r"})
    assert (got.values["chosen"], got.types["chosen"]) == (None, found)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, (3, RIGHT_TYPE)),
        (3.0, (3, RIGHT_TYPE)),
        (3.5, (None, "number that is not whole")),
        (10**400, (None, "number out of range")),
        (2**60, (None, "number that is not whole")),
        (True, (None, "boolean")),
        ("3", (None, "text")),
        (None, (1, RIGHT_TYPE)),
    ],
)
def test_whole_numbers_are_numbers_and_nothing_else(value, expected):
    found = record("votes", VOTE | {"strength": value})
    assert (found.values["strength"], found.types["strength"]) == expected


def test_numbers_are_read_out_of_csv_cells_only():
    row = {"prompt": "p", "response": "r", "score": "0.25", "criterion": ""}
    assert record("graded", row).types["score"] == "text"
    values = record("graded", row, textual=True).values
    assert (values["score"], values["criterion"]) == (0.25, "overall")
    assert record("graded", row | {"score": "inf"}, textual=True).types["score"] == "number that is not finite"
    assert record("graded", row | {"score": "good"}, textual=True).types["score"] == "text"
    assert record("graded", row | {"score": ""}, textual=True).types["score"] == "text"


def test_a_missing_field_names_the_nearest_and_a_misspelt_optional_one_is_a_problem():
    found = record("comparisons", {"prompt": "p", "choosen": "c", "rejected": "r"})
    assert found.types["chosen"] == "missing (the nearest name is 'choosen')"
    assert record("prompts", {"x": 1}).types["prompt"] == "missing (the row has x)"
    assert (
        record("votes", VOTE | {"strenght": 3}).problem
        == "unknown field 'strenght'; the nearest known one is 'strength'"
    )
    assert record("votes", VOTE | {"strength": 3, "strenght": 3}).problem is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(
    sorted({name for spec in SPECS.values() for name in spec} | {"messages", "question", "choosen"})
)


@given(kind=st.sampled_from(sorted(SPECS)), value=json_values | st.dictionaries(names, json_values, max_size=8))
def test_any_row_becomes_a_record(kind, value):
    found = record(kind, value)
    assert found.values.keys() == found.types.keys() == SPECS[kind].keys()
    required = [name for name, spec in SPECS[kind].items() if spec.required]
    if found.problem is None and all(found.types[name] == RIGHT_TYPE for name in SPECS[kind]):
        assert all(found.values[name] is not None for name in required)
