"""Rows of every record kind brought into one form, to be checked.

Bringing into form decides nothing: a value of the wrong type becomes null, beside a note of what it was, and the
checks (Great Expectations suites, in the validate stage) say which rows are bad.
"""

import difflib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from rlhf_core.data.fields import type_name, typed
from rlhf_core.data.kinds import SPECS, Kind
from rlhf_core.data.readers import Row
from rlhf_core.data.transcripts import Dialogue, is_transcript, parse_messages, parse_transcript


@dataclass(kw_only=True, slots=True)
class Record:
    """A row in the form of its kind.

    Attributes:
        values: every field of the kind; null where it is absent or of the wrong type.
        types: for every field `right`, or what stands there instead (`missing (...)`, `null`, `boolean`, ...); null in
            a row that has not the form of its kind.
        item: number of the row among all of its file, where several may share a line (a JSON array), else null.
        problem: why the row has not the form of its kind at all, or null.
        parts_early: two transcripts that differ before their last turn.
        alternates: the speakers of a dialogue take turns (true where there is no dialogue).
        unknown: fields of the row that the kind does not know; they are left out.
    """

    line: int
    sha256: str
    values: dict[str, Any]
    types: dict[str, str | None]
    item: int | None = None
    problem: str | None = None
    parts_early: bool = False
    alternates: bool = True
    unknown: frozenset[str] = field(default_factory=frozenset)

    @property
    def place(self) -> str:
        """Where the row stands in its file, in words."""
        return place(self.line, self.item)


def place(line: int, item: int | None) -> str:
    """`line 7`, or `item 3, line 1` in a file whose rows may share a line."""
    return f"line {line}" if item is None else f"item {item}, line {line}"


def content_id(*parts: str) -> str:
    """An identity made of texts: 16 hex digits."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", errors="surrogatepass")).hexdigest()[:16]


def prompt_id(prompt: str) -> str:
    """Identity of a prompt text: the first 16 hex digits of its SHA-256."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


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
    try:
        value = _unfold(kind, value, record)
    except ValueError as error:
        record.problem = str(error)
        return record
    plan = _plan(kind, frozenset(value))
    record.unknown, record.problem = plan.unknown, plan.problem
    raw = {name: value[source] for name, source in plan.sources.items()}
    for name in spec:
        if name in plan.hints:
            record.types[name] = plan.hints[name]
        else:
            record.values[name], record.types[name] = typed(spec[name], raw.get(name), textual=row.textual)
    return record


def _unfold(kind: Kind, value: dict[str, Any], record: Record) -> dict[str, Any]:
    """Rows that hold whole dialogues become rows with a prompt and responses."""
    if kind == "demonstrations" and isinstance(value.get("messages"), list) and "prompt" not in value:
        dialogue = parse_messages(value["messages"])
        record.alternates = dialogue.alternates
        rest = {name: item for name, item in value.items() if name != "messages"}
        return rest | {"prompt": dialogue.prompt, "response": dialogue.response}
    if kind == "comparisons":
        chosen, rejected = _dialogue(value, "chosen"), _dialogue(value, "rejected")
        if chosen and rejected:
            record.parts_early = chosen.prompt != rejected.prompt
            record.alternates = chosen.alternates and rejected.alternates
            return value | {"prompt": chosen.prompt, "chosen": chosen.response, "rejected": rejected.response}
    return value


def _dialogue(value: dict[str, Any], name: str) -> Dialogue | None:
    """The dialogue in a field, if it holds one: a list of messages, or a transcript in a row without a prompt."""
    item = value.get(name)
    try:
        if isinstance(item, list):
            return parse_messages(item)
        if isinstance(item, str) and is_transcript(item) and not {"prompt", "question"} & value.keys():
            return parse_transcript(item)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """Which field of a row is read as which field of the kind; the same for all rows with the same names."""

    sources: Mapping[str, str]
    unknown: frozenset[str]
    hints: Mapping[str, str]  # for a required field that is absent, what stands there instead
    problem: str | None  # an unknown field that is nearly an absent one


@lru_cache(maxsize=1024)
def _plan(kind: Kind, names: frozenset[str]) -> _Plan:
    sources: dict[str, str] = {}
    for name, spec in SPECS[kind].items():
        found = next((known for known in (name, *spec.aliases) if known in names), None)
        if found is not None:
            sources[name] = found
    unknown = names - set(sources.values())
    hints: dict[str, str] = {}
    problem = None
    for name, spec in SPECS[kind].items():
        if name in sources:
            continue
        near = difflib.get_close_matches(name, sorted(unknown), n=1, cutoff=0.6 if spec.required else 0.8)
        if spec.required:
            there = ", ".join(sorted(names)) or "nothing"
            have = f"the nearest name is {near[0]!r}" if near else f"the row has {there}"
            hints[name] = f"missing ({have})"
        elif near:
            problem = f"unknown field {near[0]!r}; the nearest known one is {name!r}"
    return _Plan(sources=sources, unknown=unknown, hints=hints, problem=problem)
