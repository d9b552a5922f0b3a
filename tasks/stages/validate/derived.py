"""What a file does not give and other files tell: demonstrations from judgements, prompts from whatever has some."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rlhf_core.data.reading.kinds import OVERALL, Kind
from rlhf_core.data.reading.records import Record
from rlhf_core.feedback.labelling import aggregate
from rlhf_core.text.identity import prompt_identity
from tasks.stages.label.files import voted

Records = Mapping[Kind, Sequence[Record]]
Row = Mapping[str, Any]

PROMPT_SOURCES: tuple[tuple[Kind, ...], ...] = (
    ("comparisons", "rankings"),
    ("votes",),
    ("demonstrations",),
    ("graded",),
)
"""The kinds that prompts are taken from: the first of which there are any, as they say most of what is labelled."""


def best_replies(records: Records, votes: Iterable[Row], grades: Iterable[Row]) -> Iterator[tuple[str, Row, str]]:
    """The responses that people found best on the whole: kind, row with `prompt`, response.

    They are those of the comparisons and rankings; where there are none, those that the votes on a pair prefer; where
    there are none of these either, of each prompt those with the highest grade. What is equal names none.

    Args:
        votes, grades: rows of the tables `votes` and of all grades, one a response.
    """
    found = False
    for kind, row, response in _chosen(records):
        found = True
        yield kind, row, response
    if found:
        return
    either = {"split": ""}  # no side: the replies to all prompts are looked at
    for ballot in voted({**row, **either} for row in votes if row["criterion"] == OVERALL):
        label = aggregate(ballot.votes).label
        if label != "tie":
            found = True
            pair = ballot.pair
            row = {"prompt": pair.prompt, "task": pair.task}
            yield "votes", row, pair.response_a if label == "a" else pair.response_b
    if not found:
        yield from _highest(row for row in grades if row["criterion"] == OVERALL)


def _chosen(records: Records) -> Iterator[tuple[str, Row, str]]:
    for record in records.get("comparisons", ()):
        if record.values["criterion"] == OVERALL:
            yield "comparisons", record.values, record.values["chosen"]
    for record in records.get("rankings", ()):
        ranking = record.values["ranking"]
        for response, rank in zip(record.values["responses"], ranking, strict=True):
            if record.values["criterion"] == OVERALL and rank == min(ranking) < max(ranking):
                yield "rankings", record.values, response


def _highest(grades: Iterable[Row]) -> Iterator[tuple[str, Row, str]]:
    by_prompt: dict[str, list[Row]] = {}
    for row in grades:
        by_prompt.setdefault(row["prompt"], []).append(row)
    for rows in by_prompt.values():
        scores = [row["score"] for row in rows]
        for row in rows:
            if row["score"] == max(scores) > min(scores):
                yield "graded", row, row["response"]


def derived_prompts(records: Records) -> Iterator[Record]:
    """One row for each prompt, the first, of the kinds of `PROMPT_SOURCES`."""
    kinds = next((some for some in PROMPT_SOURCES if any(kind in records for kind in some)), ())
    known: set[str] = set()
    for record in (record for kind in kinds for record in records.get(kind, ())):
        identity = prompt_identity(record.values["prompt"])
        if identity not in known:
            known.add(identity)
            yield record
