"""What a good row of each record kind is, as Great Expectations; with `expectations` the only importer of it.

Every expectation carries a code, under which its failures are counted, and words for a row that fails it. `suite` looks
at rows by themselves, `beside_suite` at good rows beside each other.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

os.environ["GX_ANALYTICS_ENABLED"] = "false"  # read once, when the library is imported

import great_expectations.expectations as gxe

from rlhf_core.config import ValidateConfig
from rlhf_core.data.reading.fields import RIGHT_TYPE
from rlhf_core.data.reading.judgements import ITEMS, RESPONSES, Repeat
from rlhf_core.data.reading.kinds import SPECS, Kind
from rlhf_core.data.reading.rankings import Bound, ranking_bounds
from rlhf_core.data.reading.records import Record
from tasks.stages.validate.screening import DUPLICATE, REVISED

NAME_LENGTH = 200
ANNOTATOR = r"^[\w.@:+-]{1,64}\Z"
CHOICES = ["a", "b", "tie"]
STRENGTH = (1, 5)
BESIDE = {
    "duplicate": (DUPLICATE, "duplicate of line"),
    "revised": (REVISED, "revised at line"),
    "taken": ("id.taken", "id taken at line"),
}
"""Why a good row may not count beside another: the code, and the column that names the other's line."""
_WANTED = {
    "prompt": "text",
    "response": "text",
    "responses": "an array of texts",
    "ranking": "an array of whole numbers",
    "name": "text",
    "integer": "a whole number",
    "number": "a number",
}
_SAME: Mapping[Kind, str] = {
    "comparisons": "chosen equals rejected",
    "votes": "response_a equals response_b",
    "rankings": "responses: two are equal",
}

FORM_OF_TOOLS = "form of tools"


@dataclass(kw_only=True, slots=True)
class CheckedRow:
    """A record with what is known of its responses, and of it beside the other good rows of its kind."""

    record: Record
    same_responses: bool = False
    repeat: Repeat | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """An expectation, the code that its failures are counted under, and words for one row that fails it."""

    code: str
    expectation: gxe.Expectation
    say: Callable[[CheckedRow], str]
    warning: bool = False


def suite(kind: Kind, config: ValidateConfig) -> Iterator[Check]:
    """The checks of a record kind."""
    yield Check(
        code="row.form",
        expectation=gxe.ExpectColumnValuesToBeNull(column="form"),
        say=lambda item: item.record.problem or "",
    )
    for name in SPECS[kind]:
        yield from _field_checks(kind, name, config)
    if kind in _SAME:
        yield Check(
            code="responses.same",
            expectation=gxe.ExpectColumnValuesToBeInSet(column="responses are the same", value_set=[False]),
            say=lambda _: f"{_SAME[kind]} but for case, white space, Unicode form or what cannot be seen",
        )
    if kind == "rankings":
        bounds = ranking_bounds(config.max_response_chars, empty=config.keep_empty_responses)
        yield from map(_ranking_check, bounds)
    yield from _dialogue_checks(kind)


def tools_check() -> Check:
    """That tools, and what calls and answers them, have their form: of rows with tools, which most files have not."""
    return Check(
        code="tools.form",
        expectation=gxe.ExpectColumnValuesToBeNull(column=FORM_OF_TOOLS),
        say=lambda item: item.record.tool_problem or "",
    )


def _dialogue_checks(kind: Kind) -> Iterator[Check]:
    if kind in _SAME:
        yield Check(
            code="transcripts.part_early",
            expectation=gxe.ExpectColumnValuesToBeInSet(column="transcripts part early", value_set=[False]),
            say=lambda _: "its dialogues differ before the last turn, so the replies answer different prompts",
        )
    odd = {
        "turns.alternate": (
            "turns alternate",
            True,
            "somebody speaks twice in a row, or the human does not speak first",
        ),
        "prompt.reformed": ("nearly a transcript", False, "prompt: nearly a transcript, and read as one"),
        "turns.within": ("turns within a turn", False, "prompt: one turn of the user, though lines in it begin turns"),
    }
    for code, (column, right, words) in odd.items():
        expectation = gxe.ExpectColumnValuesToBeInSet(column=column, value_set=[right], severity="warning")
        yield Check(code=code, expectation=expectation, say=partial(_say, words), warning=True)


def _say(words: str, item: CheckedRow) -> str:
    return words


def to_see(name: str) -> str:
    """Name of the column that counts the characters of a field that can be seen."""
    return f"characters of {name} to see"


def _field_checks(kind: Kind, name: str, config: ValidateConfig) -> Iterator[Check]:
    spec = SPECS[kind][name]
    yield Check(
        code=f"{name}.type",
        expectation=gxe.ExpectColumnValuesToBeInSet(column=f"type of {name}", value_set=[RIGHT_TYPE]),
        say=lambda item: f"{name}: is {item.record.types[name]}, must be {_WANTED[spec.type]}",
    )
    if spec.type == "prompt":
        yield from _text_checks(name, config.max_prompt_chars)
    elif spec.type == "response":
        may_be_empty = config.keep_empty_responses and kind in RESPONSES
        yield from _text_checks(name, config.max_response_chars, may_be_empty=may_be_empty)
    elif spec.type == "name" and name not in ("task", "source"):
        yield _empty_check(name)
    if spec.type == "name":
        yield _length_check(name, "long", f"is longer than {NAME_LENGTH} characters", max_value=NAME_LENGTH)
    yield from _value_checks(name, config)


def _ranking_check(bound: Bound) -> Check:
    def say(item: CheckedRow) -> str:
        return bound.say(item.record.values["responses"], item.record.values["ranking"])

    between = gxe.ExpectColumnValuesToBeBetween(column=bound.name, min_value=bound.least, max_value=bound.most)
    return Check(code=bound.code, expectation=between, say=say)


def _text_checks(name: str, longest: int, *, may_be_empty: bool = False) -> Iterator[Check]:
    if not may_be_empty:
        yield _empty_check(name)
    yield _length_check(name, "long", f"is longer than {longest} characters", max_value=longest)


def _empty_check(name: str) -> Check:
    def say(item: CheckedRow) -> str:
        return f"{name}: holds nothing that can be seen" if item.record.values[name].strip() else f"{name}: is empty"

    expectation = gxe.ExpectColumnValuesToBeBetween(column=to_see(name), min_value=1)
    return Check(code=f"{name}.empty", expectation=expectation, say=say)


def _length_check(name: str, code: str, words: str, **bounds: int) -> Check:
    expectation = gxe.ExpectColumnValueLengthsToBeBetween(column=name, **bounds)
    return Check(code=f"{name}.{code}", expectation=expectation, say=lambda _: f"{name}: {words}")


def _value_checks(name: str, config: ValidateConfig) -> Iterator[Check]:
    """What only certain fields may hold."""
    between = partial(gxe.ExpectColumnValuesToBeBetween, column=name)
    one_of = partial(gxe.ExpectColumnValuesToBeInSet, column=name)
    match name:
        case "choice":
            yield _value_check(name, one_of(value_set=CHOICES), f"must be one of {', '.join(CHOICES)}")
        case "annotator":
            form = gxe.ExpectColumnValuesToMatchRegex(column=name, regex=ANNOTATOR)
            yield _value_check(name, form, "must be 1 to 64 letters, digits or . @ : + - _")
        case "strength":
            yield _value_check(name, between(min_value=STRENGTH[0], max_value=STRENGTH[1]), "must be from 1 to 5")
        case "seconds":
            yield _value_check(name, between(min_value=0), "must not be negative")
        case "criterion":
            known = list(config.criteria)
            words = f"must be one of {', '.join(known)}, or be named in validate.criteria"
            yield _value_check(name, one_of(value_set=known), words)
        case "score" if config.score_range:
            low, high = config.score_range
            yield _value_check(name, between(min_value=low, max_value=high), f"must be from {low} to {high}")


def _value_check(name: str, expectation: gxe.Expectation, words: str) -> Check:
    return Check(
        code=f"{name}.value",
        expectation=expectation,
        say=lambda item: f"{name}: is {str(item.record.values[name])[:40]!r}, {words}",
    )


def beside_suite(kind: Kind) -> Iterator[Check]:
    """The checks of good rows beside each other; `BESIDE` names the columns."""
    said = {
        "duplicate": "the same {what} stands at {place}",
        "revised": "annotator {who!r} judges these responses again at {place}, and the last judgement counts",
        "taken": "id: {place} has the same one and says something else",
    }
    what = "item" if kind in ITEMS else "judgement"

    def words(why: str, item: CheckedRow) -> str:
        other = item.repeat.other if item.repeat else item.record
        return said[why].format(what=what, place=other.place, who=other.values.get("annotator"))

    for why, (code, column) in BESIDE.items():
        if why != "revised" or kind not in ITEMS:
            yield Check(code=code, expectation=gxe.ExpectColumnValuesToBeNull(column=column), say=partial(words, why))
