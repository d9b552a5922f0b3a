"""Rows of every record kind brought into one form, to be checked.

Bringing into form decides nothing: a value of the wrong type becomes null, beside a note of what it was, and the
checks (Great Expectations suites, in the validate stage) say which rows are bad.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_core.data.reading.columns import known_columns, plan, weight_problem
from rlhf_core.data.reading.dialogues import unfold
from rlhf_core.data.reading.fields import RIGHT_TYPE, is_missing, type_name, typed
from rlhf_core.data.reading.kinds import SPECS, Kind
from rlhf_core.data.reading.readers import Refused, Row
from rlhf_core.text.tool_turns import ToolFault


@dataclass(kw_only=True, slots=True)
class Record:
    """A row in the form of its kind.

    Attributes:
        values: every field of the kind; null where it is absent or of the wrong type.
        types: for every field `right`, or what stands there instead (`missing (...)`, `null`, `boolean`, ...); null in
            a row that has not the form of its kind.
        item: number of the row among all of its file, where several may share a line (a JSON array), else null.
        problem: why the row has not the form of its kind at all, or null.
        tool_problem: why its tools, or what is said of them, have not the form they must have, or null.
        parts_early: two transcripts that differ before their last turn.
        alternates: the speakers of a dialogue take turns (true where there is no dialogue).
        reformed: the prompt was a text that is nearly a transcript, and is one now.
        holds_turns: the prompt is read as one turn of the user, and has lines that begin turns.
        unreadable: a field of the kind that cannot be read, and why, or null.
        unknown: fields of the row that the kind does not know; they are left out.
        unit: what the row has in the column that splits are made by, if there is one.
    """

    line: int
    sha256: str
    values: dict[str, Any]
    types: dict[str, str | None]
    item: int | None = None
    problem: str | None = None
    tool_problem: str | None = None
    parts_early: bool = False
    alternates: bool = True
    reformed: bool = False
    holds_turns: bool = False
    unreadable: str | None = None
    unknown: frozenset[str] = field(default_factory=frozenset)
    unit: str | None = None

    @property
    def place(self) -> str:
        """Where the row stands in its file, in words."""
        return place(self.line, self.item)


def place(line: int, item: int | None) -> str:
    """`line 7`, or `item 3, line 1` in a file whose rows may share a line."""
    return f"line {line}" if item is None else f"item {item}, line {line}"


def to_record(kind: Kind, row: Row) -> Record:
    """Bring a row into the form of its kind; what does not fit is noted in the record, never raised."""
    spec = SPECS[kind]
    value = row.value
    if isinstance(value, str) and kind in ("prompts", "heldout_prompts"):
        value = {"prompt": value}
    record = Record(
        line=row.line, item=row.item, sha256=row.sha256, values=dict.fromkeys(spec), types=dict.fromkeys(spec)
    )
    if not isinstance(value, dict):
        record.problem = f"a row must be an object, this is {type_name(value)}"
        return record
    faults = {
        name: fault
        for name, fault in row.faults.items()
        if name in known_columns(kind) and not is_missing(value[name])  # NaN is judged by its field
    }
    if faults:
        name = min(faults)
        record.unreadable = f"{name}: {faults[name]}"
        return record
    try:
        unfolded = unfold(kind, value)
    except ToolFault as error:
        record.tool_problem = str(error)
        return record
    except ValueError as error:
        record.problem = str(error)
        return record
    record.parts_early, record.alternates = unfolded.parts_early, unfolded.alternates
    record.reformed, record.holds_turns = unfolded.reformed, unfolded.holds_turns
    columns = plan(kind, frozenset(unfolded.value))
    record.unknown = columns.unknown | {f"{name} of a message" for name in unfolded.notes}
    record.problem = columns.problem or weight_problem(kind, unfolded.value, columns.unknown)
    for name in spec:
        if name in columns.hints:
            record.types[name] = columns.hints[name]
        else:
            source = columns.sources.get(name)
            given = None if source is None else unfolded.value[source]
            record.values[name], record.types[name] = typed(spec[name], given, textual=row.textual)
    return record


def fault_of(kind: Kind, row: Row | Refused) -> str:
    """Why a row cannot be used as one of a kind, as far as its form goes; empty where it can."""
    if isinstance(row, Refused):
        return row.reason
    record = to_record(kind, row)
    if found := record.problem or record.tool_problem or record.unreadable:
        return found
    return "; ".join(f"{name}: {what}" for name, what in record.types.items() if what != RIGHT_TYPE)


_MOST_SPECIFIC_FIRST: tuple[Kind, ...] = ("comparisons", "votes", "rankings", "graded", "demonstrations", "prompts")


def likely_kind(rows: Sequence[Row | Refused]) -> Kind | None:
    """What rows of a file probably are: the kind with most fields that at least half as many fit as any; null: none.

    A grade has all that a demonstration has, and a comparison all that a prompt has.
    """
    fits = {kind: sum(not fault_of(kind, row) for row in rows) for kind in _MOST_SPECIFIC_FIRST}
    most = max(fits.values())
    return next((kind for kind in _MOST_SPECIFIC_FIRST if 2 * fits[kind] >= most), None) if most else None
