"""Which rows say the same thing twice, which judgements were revised, and which are several people's votes.

A row about an item (a demonstration, a prompt) that stands again, text for text, is a duplicate. A judgement (a vote, a
comparison, a ranking, a grade) that stands again is one more judgement, unless something says that it is not:

- of a named annotator's judgements of the same responses the last counts, in whatever order opinions changed;
- without a name, a row that has the id of an earlier one and says the same is that row again.

Of votes, `pair_id` says what was judged; of the others, the prompt, the responses and the criterion do. A prompt is
the same one as text, as a transcript and as messages (`rlhf_core.text.identity`).
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_core.data.reading.kinds import UNNAMED, Kind
from rlhf_core.data.reading.records import Record
from rlhf_core.text.identity import prompt_identity
from rlhf_core.text.normal import normal_form

ITEMS: Mapping[Kind, tuple[str, ...]] = {
    "demonstrations": ("prompt", "response"),
    "prompts": ("prompt",),
    "heldout_prompts": ("prompt",),
}
"""The kinds whose rows are items, with the fields that make two of them the same one."""

RESPONSES: Mapping[Kind, tuple[str, ...]] = {
    "comparisons": ("chosen", "rejected"),
    "votes": ("response_a", "response_b"),
    "rankings": ("responses",),
    "graded": ("response",),
}
"""The kinds whose rows are judgements, with the fields that hold the responses that are judged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Repeat:
    """Why a row does not count beside another one.

    `duplicate`: the other says the same; `revised`: the same annotator said something else there, later; `taken`: the
    other has this row's id for something else.
    """

    why: Literal["duplicate", "revised", "taken"]
    other: Record


def repeats(kind: Kind, records: Sequence[Record]) -> dict[int, Repeat]:
    """Which of the rows, by position, do not count because of another one, and why.

    Args:
        records: good rows only: a bad row takes nobody's place.
    """
    found = _taken_ids(kind, records)
    rest = [(position, record) for position, record in enumerate(records) if position not in found]
    names = pair_names(record.values for _, record in rest) if kind == "votes" else {}
    standing: dict[Hashable, tuple[int, Record]] = {}
    for position, record in rest:
        key = _key(kind, record, names)
        if key is None:
            continue
        if key not in standing:
            standing[key] = position, record
            continue
        earlier, first = standing[key]
        same = _said(kind, record) == _said(kind, first)
        if _is_named(kind, record) and not same:
            found[earlier] = Repeat(why="revised", other=record)
            standing[key] = position, record
        else:
            found[position] = Repeat(why="duplicate" if same else "taken", other=first)
    return found


def judged(kind: Kind, values: Mapping[str, Any], names: Mapping[Hashable, str]) -> Hashable:
    """What a judgement is about: its criterion, and the pair or the prompt with its responses, in any order."""
    prompt, *responses = texts = texts_of(kind, values)
    pair = (values["pair_id"] or names.get(texts)) if kind == "votes" else None
    return values["criterion"], pair or (prompt_identity(prompt), *responses)


def pair_names(votes: Iterable[Mapping[str, Any]]) -> dict[Hashable, str]:
    """The `pair_id` that a pair's texts have in the first vote that gives one, for the votes that give none."""
    names: dict[Hashable, str] = {}
    for values in votes:
        if values["pair_id"]:
            names.setdefault(texts_of("votes", values), values["pair_id"])
    return names


def texts_of(kind: Kind, values: Mapping[str, Any]) -> tuple[str, ...]:
    """The prompt of a judgement and its responses, sorted."""
    return values["prompt"], *sorted(responses_of(kind, values))


def responses_of(kind: Kind, values: Mapping[str, Any]) -> list[str]:
    """The responses that a row judges, in its order; what is missing is left out."""
    given = [values[name] for name in RESPONSES.get(kind, ())]
    return [text for item in given for text in (item if isinstance(item, list) else [item]) if text is not None]


def _taken_ids(kind: Kind, records: Sequence[Record]) -> dict[int, Repeat]:
    """Rows whose id an earlier row has for other texts."""
    owners: dict[str, tuple[Hashable, Record]] = {}
    found: dict[int, Repeat] = {}
    for position, record in enumerate(records):
        name = record.values["pair_id" if kind == "votes" else "id"]
        if name is not None:
            owner, first = owners.setdefault(name, (_owner(kind, record), record))
            if owner != _owner(kind, record):
                found[position] = Repeat(why="taken", other=first)
    return found


def _owner(kind: Kind, record: Record) -> Hashable:
    """What an id stands for, whoever judged it on whatever criterion; a little white space makes no other pair."""
    if kind in ITEMS:
        return tuple(record.values[name] for name in ITEMS[kind])
    prompt, *responses = texts_of(kind, record.values)
    return prompt_identity(prompt), *sorted(map(normal_form, responses))


def _key(kind: Kind, record: Record, names: Mapping[Hashable, str]) -> Hashable | None:
    """What only one row may have; none for a judgement that nothing tells from one of another person."""
    if kind in ITEMS:
        return _owner(kind, record)
    subject = judged(kind, record.values, names)
    if _is_named(kind, record):
        return "by", record.values["annotator"], subject
    return None if record.values["id"] is None else ("id", record.values["id"], subject)


def _is_named(kind: Kind, record: Record) -> bool:
    return kind in RESPONSES and record.values["annotator"] != UNNAMED


def _said(kind: Kind, record: Record) -> Hashable:
    """What a judgement says of the responses, whichever stood first."""
    values = record.values
    match kind:
        case "votes":
            chosen = {"a": values["response_a"], "b": values["response_b"]}.get(values["choice"])
            return chosen, None if chosen is None else values["strength"]
        case "comparisons":
            return values["chosen"], values["strength"]
        case "rankings":
            return tuple(sorted(zip(values["responses"], values["ranking"], strict=True)))
        case "graded":
            return values["score"]
    return None
