"""Rows in every accepted form end in one form; what does not fit is noted, and nothing is raised."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.templates import CALL, TOOLS, WITH_TOOLS

from rlhf_core.data.reading.fields import RIGHT_TYPE
from rlhf_core.data.reading.kinds import SPECS
from rlhf_core.data.reading.readers import Row
from rlhf_core.data.reading.records import fault_of, likely_kind, to_record
from rlhf_core.text.transcripts import parse_messages

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


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT + " ", PROMPT.lstrip(), "How are you?", "  hi "])
def test_a_prompt_beside_transcripts_says_what_they_say(prompt):
    found = record("comparisons", {"prompt": prompt, "chosen": CHOSEN, "rejected": REJECTED})
    assert (found.values["prompt"], found.values["chosen"], found.problem) == (PROMPT, "Well.", None)


@pytest.mark.parametrize("reply", [CHOSEN, CHOSEN.strip(), messages("Hi", "Hello", "How are you?", "Well.")])
@pytest.mark.parametrize(
    ("kind", "name"),
    [("comparisons", "chosen"), ("votes", "response_b"), ("graded", "response"), ("demonstrations", "response")],
)
def test_a_prompt_that_differs_from_the_dialogue_beside_it_is_refused(kind, name, reply):
    row = {"prompt": "Something else?", "chosen": "r", "rejected": "r", "response_a": "r", "response_b": "r"}
    found = record(kind, row | {name: reply})
    assert found.problem == f"prompt: says something else than the turns before the reply in {name}"
    same = record(kind, row | {"prompt": PROMPT, name: reply})
    assert (same.values["prompt"], same.values[name], same.problem) == (PROMPT, "Well.", None)


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
        ([*messages("Hi"), {"role": "robot", "content": "x"}], "message 2 has role 'robot'"),
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


TURNS = messages("Hi", "Hello", "How are you?")
PARTS = [
    {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
]


def reply(text):
    return [{"role": "assistant", "content": text}]


# What TRL calls its formats (docs of 1.16, "Dataset formats and types"), each saying the same.
SHAPES = [
    ("comparisons", {"prompt": TURNS, "chosen": reply("Well."), "rejected": reply("Go.")}),
    ("comparisons", {"prompt": TURNS, "chosen": "Well.", "rejected": "Go."}),
    ("comparisons", {"prompt": PROMPT, "chosen": reply("Well."), "rejected": reply("Go.")}),
    ("comparisons", {"chosen": TURNS + reply("Well."), "rejected": TURNS + reply("Go.")}),
    ("comparisons", {"prompt": TURNS, "chosen": TURNS + reply("Well."), "rejected": TURNS + reply("Go.")}),
    ("comparisons", {"prompt": TURNS[:1], "chosen": TURNS[1:] + reply("Well."), "rejected": TURNS[1:] + reply("Go.")}),
    ("demonstrations", {"prompt": TURNS, "completion": reply("Well.")}),
    ("demonstrations", {"prompt": PROMPT, "completion": "Well."}),
    ("demonstrations", {"messages": TURNS + reply("Well.")}),
    ("demonstrations", {"prompt": "Hi", "messages": TURNS + reply("Well.")}),
    ("votes", {"prompt": TURNS, "response_a": reply("Well."), "response_b": "Go."} | {"annotator": "a", "choice": "a"}),
    ("rankings", {"prompt": TURNS, "responses": [reply("Well."), "Go."], "ranking": [1, 2]}),
    ("graded", {"prompt": TURNS, "completion": reply("Well."), "score": 1}),
    ("prompts", {"prompt": TURNS}),
    ("prompts", {"messages": TURNS}),
    ("heldout_prompts", {"prompt": PROMPT.strip()}),
]


@pytest.mark.parametrize(("kind", "row"), SHAPES)
def test_every_shape_of_a_dialogue_gives_the_same_row(kind, row):
    found = record(kind, row)
    assert found.problem is None
    assert set(found.types.values()) == {RIGHT_TYPE}
    assert found.values["prompt"] == PROMPT
    replies = {name: found.values.get(name) for name in ("chosen", "response", "response_a", "responses")}
    assert {str(text) for text in replies.values() if text} <= {"Well.", "['Well.', 'Go.']"}
    assert found.alternates
    assert not found.parts_early


def test_developer_turns_are_the_systems_and_content_may_come_in_parts():
    found = record("comparisons", {"prompt": PARTS, "chosen": reply([{"type": "text", "text": "a"}]), "rejected": "b"})
    assert found.values["prompt"] == "Be kind.\n\nHuman: Hi\n\nAssistant:"
    assert found.values["chosen"] == "a"
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]
    assert (
        "message 1 has a part of type 'image_url'; only text is read" in record("prompts", {"prompt": picture}).problem
    )


def test_explicit_prompts_whose_replies_part_early_are_noted():
    chosen, rejected = TURNS[1:] + reply("x"), reply("Hullo") + TURNS[2:] + reply("y")
    assert record("comparisons", {"prompt": TURNS[:1], "chosen": chosen, "rejected": rejected}).parts_early


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        (reply("Hi"), "prompt: the last message of a prompt must be the user's, or what a tool answered"),
        ([], "prompt: the last message of a prompt must be the user's, or what a tool answered"),
        ("Human: A\n\nAssistant: B", "prompt: begins like a transcript and ends within a turn of the assistant"),
        ("\n\nHuman: A\n\nAssistant: B", "prompt: begins like a transcript and ends within a turn of the assistant"),
    ],
)
def test_a_prompt_that_the_assistant_has_answered_is_refused(prompt, problem):
    assert record("prompts", {"prompt": prompt}).problem == problem


@pytest.mark.parametrize("kind", sorted(SPECS))
def test_a_prompt_that_is_nearly_a_transcript_becomes_one_and_is_noted(kind):
    found = record(kind, {"prompt": PROMPT + " "})
    assert (found.values["prompt"], found.reformed, found.alternates) == (PROMPT, True, True)
    twice = record(kind, {"prompt": "\n\nHuman: a\n\nHuman: b\n\nAssistant:"})
    assert (twice.reformed, twice.alternates) == (False, False)
    within = record(kind, {"prompt": "Sum up:\n\nHuman: hi\n\nAssistant: hello\n\nWell?"})
    assert (within.holds_turns, within.reformed) == (True, False)


WHOLE = "Human: Hi\n\nAssistant: Hello\n\nHuman: How are you?\n\nAssistant: "


def test_whole_dialogues_that_are_nearly_transcripts_are_read():
    found = record("comparisons", {"chosen": WHOLE + "Well.", "rejected": REJECTED.replace("\n", "\r\n").strip()})
    assert (found.values["prompt"], found.values["chosen"], found.values["rejected"]) == (PROMPT, "Well.", "Go away.")


@pytest.mark.parametrize(
    "name",
    [
        "uid",
        "idx",
        "pid",
        "qid",
        "ids",
        "source_id",
        "resource",
        "sources",
        "tasks",
        "task_id",
        "annotators",
    ],
)
def test_columns_that_are_other_words_are_left_out(name):
    found = record("comparisons", {"prompt": "p", "chosen": "c", "rejected": "r", name: "x"})
    assert (found.problem, found.unknown) == (None, {name})


def test_a_column_without_a_name_is_read_as_no_field():
    """What data frames write first: the number of the row. It is nobody's strength, criterion or annotator."""
    row = {"": "0", "prompt": "p", "chosen": "c", "rejected": "r"}
    found = to_record("comparisons", Row(line=1, sha256="", value=row, textual=True))
    assert (found.problem, found.unknown) == (None, {""})
    optional = [found.values[name] for name in ("id", "annotator", "strength", "criterion", "task", "source")]
    assert optional == [None, "file", 1, "overall", "", "file"]


@pytest.mark.parametrize(
    "name",
    [
        "anotator",
        "annotater",
        "annottaor",
        "strenght",
        "sourc",
        "critterion",
        "criteria",
        "Annotator",
        "STRENGTH",
        " criterion ",
    ],
)
def test_misspelt_optional_fields_are_a_problem(name):
    assert (
        f"unknown field {name!r}"
        in record("comparisons", {"prompt": "p", "chosen": "c", "rejected": "r", name: 1}).problem
    )


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1.0, "1"), (7, "7"), (float("nan"), None), (None, None), (" a\u200b ", "a"), (1.5, "number"), (True, "boolean")],
)
def test_ids_as_data_frames_write_them(value, expected):
    row = Row(line=1, sha256="", value={"prompt": "p", "id": value}, faults={"id": "nan"} if value != value else {})
    found = to_record("prompts", row)
    assert expected in ((found.values["id"], found.types["id"]) if expected is not None else (found.values["id"],))


def test_what_nobody_reads_spoils_no_row():
    row = {"prompt": "p", "chosen": "c", "rejected": "r", "gap": float("nan"), "strength": float("nan")}
    found = to_record("comparisons", Row(line=1, sha256="", value=row, faults={"gap": "nan", "strength": "nan"}))
    assert (found.unreadable, found.problem, found.values["strength"]) == (None, None, 1)
    grade = {"prompt": "p", "response": "r", "score": float("nan")}
    found = to_record("graded", Row(line=1, sha256="", value=grade, faults={"score": "nan is not a finite number"}))
    assert found.types["score"] == "number that is not finite"
    faults = {"chosen": "control character U+0000"}
    assert to_record("comparisons", Row(line=1, sha256="", value=row, faults=faults)).unreadable == (
        "chosen: control character U+0000"
    )


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("comparisons", "weight", 0.5),
        ("comparisons", "soft_label", 0.8),
        ("comparisons", "label", 0),
        ("comparisons", "margin", 3.0),
        ("votes", "weight", 2),
        ("graded", "sample_weight", "0.5"),
        ("demonstrations", "label", False),
        ("demonstrations", "Weight", 0),
        ("prompts", "weight", [1]),
    ],
)
def test_weights_and_soft_labels_that_say_something_are_refused(kind, name, value):
    row = VOTE | {"chosen": "c", "rejected": "r", "response": "r", "score": 1}
    assert record(kind, row | {name: value}).problem.startswith(f"{name} is {value}")
    for neutral in (1, 1.0, True, None, float("nan"), "1"):
        assert record(kind, row | {name: neutral}).problem is None


def test_what_else_messages_hold_is_named_as_left_out():
    thinking = {"role": "assistant", "content": "4.", "reasoning_content": "2 + 2", "name": None}
    asked = {"role": "user", "content": "Sum?", "name": "ann"}
    found = record("demonstrations", {"messages": [asked, thinking], "id": "1"})
    assert (found.problem, found.unknown) == (None, {"name of a message", "reasoning_content of a message"})
    pair = {"prompt": [asked], "chosen": [thinking], "rejected": [{"role": "assistant", "content": "5."}]}
    assert record("comparisons", pair).unknown == found.unknown


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("soft_labels", [0.3, 0.7]), ("Soft Label", 0.7), ("confidence", 0.6), ("prob", 0.2), ("chosen-prob", "0.9"),
        ("preference_strength", 0.5), ("is_tie", True), ("Tie", 1), ("sample-weight", 2),
    ],
)  # fmt: skip
def test_soft_labels_weights_and_ties_of_comparisons_are_refused_by_name(column, value):
    found = record("comparisons", {"prompt": "p", "chosen": "c", "rejected": "r", column: value})
    assert found.problem.startswith(f"{column} is ")


@pytest.mark.parametrize(("column", "value"), [("is_tie", False), ("tie", 0), ("tied", None), ("confidence", 1.0)])
def test_those_that_say_nothing_are_left_out(column, value):
    found = record("comparisons", {"prompt": "p", "chosen": "c", "rejected": "r", column: value})
    assert (found.problem, found.unknown) == (None, {column})


TOOL_DIALOGUE = parse_messages(WITH_TOOLS, TOOLS)
NO = {"role": "assistant", "content": "No."}
ASKED = {"prompt": WITH_TOOLS[:4], "tools": TOOLS}
TOOL_SHAPES = [
    ("demonstrations", {"messages": WITH_TOOLS, "tools": TOOLS}),
    ("demonstrations", {"messages": WITH_TOOLS, "tools": json.dumps(TOOLS)}),
    ("demonstrations", {"prompt": WITH_TOOLS[:2], "completion": WITH_TOOLS[2:], "tools": TOOLS}),
    ("demonstrations", {"prompt": WITH_TOOLS[:4], "response": "3 of them.", "tools": TOOLS}),
    ("demonstrations", {"prompt": TOOL_DIALOGUE.prompt, "response": "3 of them."}),
    ("comparisons", {"chosen": WITH_TOOLS, "rejected": [*WITH_TOOLS[:4], NO], "tools": TOOLS}),
    ("comparisons", ASKED | {"chosen": "3 of them.", "rejected": "No."}),
    ("comparisons", ASKED | {"chosen": WITH_TOOLS[4:], "rejected": [NO]}),
    ("prompts", {"messages": WITH_TOOLS[:4], "tools": TOOLS}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "row"), TOOL_SHAPES)
def test_every_shape_of_a_dialogue_with_tools_gives_the_same_row(kind, row):
    found = record(kind, row)
    assert (found.problem, found.tool_problem) == (None, None)
    assert set(found.types.values()) == {RIGHT_TYPE}
    assert not found.unknown
    assert found.values["prompt"] == TOOL_DIALOGUE.prompt
    assert {found.values.get(name) for name in ("response", "chosen")} <= {None, "3 of them."}
    assert found.alternates
    assert not found.parts_early


def test_a_reply_that_calls_a_tool_is_one_of_a_comparison():
    calls = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    found = record("comparisons", {"prompt": WITH_TOOLS[:2], "chosen": [calls], "rejected": "No.", "tools": TOOLS})
    assert json.loads(found.values["chosen"]) == {"content": "", "tool_calls": [CALL]}


def test_tools_beside_plain_texts_make_the_prompt_one_with_tools():
    found = record("demonstrations", {"prompt": "How?", "response": "So.", "tools": TOOLS})
    assert json.loads(found.values["prompt"]) == {"tools": TOOLS, "messages": [{"role": "user", "content": "How?"}]}


def test_a_malformed_call_is_a_fault_of_tools_with_its_field():
    broken = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]}
    found = record("comparisons", {"prompt": WITH_TOOLS[:2], "chosen": [broken], "rejected": "No."})
    assert found.tool_problem.startswith("chosen: message 3: tool call 1: arguments are not JSON")
    assert found.problem is None
    assert fault_of("comparisons", Row(line=1, sha256="", value={"prompt": [broken], "chosen": "a", "rejected": "b"}))


def test_the_kind_of_rows_is_told_from_their_fields():
    def told(*values):
        return likely_kind([Row(line=1, sha256="", value=value) for value in values])

    assert (
        told({"prompt": "p", "response": "r", "score": 1}, {"prompt": "p", "response": "r", "score": "x"}) == "graded"
    )
    assert told({"prompt": "p", "response": "r"}) == "demonstrations"
    assert told({"speech": 1}) is None
