"""What validation says of the rows of a record kind: which are kept, which are set aside and why, and what is odd."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_core.data.reading.judgements import RESPONSES, judged, pair_names
from rlhf_core.data.reading.kinds import UNNAMED, Kind
from rlhf_core.data.reading.readers import Refused
from rlhf_core.data.reading.records import Record

DUPLICATE, REVISED, UNREADABLE = "row.duplicate", "row.revised", "row.unreadable"
ASKED_LATER, HELD_REPLY, HELD_ELSEWHERE = "split.asked_later", "split.held_reply", "split.held_elsewhere"
BETWEEN_SIDES = (ASKED_LATER, HELD_REPLY, HELD_ELSEWHERE)
NOT_BAD = (DUPLICATE, REVISED, *BETWEEN_SIDES)
"""Codes of rows that are set aside although nothing is wrong with them: another row says it, or says it anew, or they
would stand between the training rows and the held-out ones."""

Entry = dict[str, Any]


@dataclass(kw_only=True, slots=True)
class Screening:
    """What validation says of one record kind.

    Attributes:
        kept: good rows, in the order of the file.
        quarantine: one entry a row set aside.
        warned: one entry a warning.
        unknown: fields that the kind does not know.
        page: of the Data Docs; empty where no row could be read, so that none was checked.
    """

    kind: Kind
    file: str
    kept: list[Record] = field(default_factory=list)
    quarantine: list[Entry] = field(default_factory=list)
    warned: list[Entry] = field(default_factory=list)
    unknown: Counter[str] = field(default_factory=Counter)
    page: str = ""

    def set_aside(self, row: Record | Refused, reason: str, codes: Sequence[str]) -> None:
        """Put a row into the quarantine."""
        self.quarantine.append(self._entry(row, reason) | {"codes": list(codes), "sha256": row.sha256})

    def warn(self, row: Record, reason: str, code: str) -> None:
        """Note what is odd about a row, kept or not."""
        self.warned.append(self._entry(row, reason) | {"code": code})

    def _entry(self, row: Record | Refused, reason: str) -> Entry:
        return {"kind": self.kind, "file": self.file, "line": row.line, "item": row.item, "reason": reason}

    @property
    def bad_entries(self) -> list[Entry]:
        """The quarantine without rows that another row repeats or revises."""
        return [entry for entry in self.quarantine if not set(entry["codes"]) <= set(NOT_BAD)]

    def count(self, code: str) -> int:
        """Rows set aside for this reason alone."""
        return sum(entry["codes"] == [code] for entry in self.quarantine)

    @property
    def rows(self) -> int:
        """Rows read."""
        return len(self.kept) + len(self.quarantine)

    @property
    def bad_share(self) -> float:
        """Bad rows over rows; 0 for an empty file."""
        return len(self.bad_entries) / self.rows if self.rows else 0.0

    @property
    def reasons(self) -> Counter[str]:
        """Rows by why they were set aside; a row with two reasons counts under both."""
        return Counter(code for entry in self.quarantine for code in entry["codes"])

    def metrics(self) -> dict[str, Any]:
        """Counts of this kind."""
        return {
            "rows_in": self.rows,
            "rows_kept": len(self.kept),
            "rows_bad": len(self.bad_entries),
            "rows_duplicate": self.count(DUPLICATE),
            "rows_revised": self.count(REVISED),
            "rows_between_sides": sum(map(self.count, BETWEEN_SIDES)),
            "bad_share": self.bad_share,
            "reasons": dict(sorted(self.reasons.items())),
            "warnings": dict(sorted(Counter(entry["code"] for entry in self.warned).items())),
            "unknown_fields": sorted(self.unknown),
            **self._judgements(),
        }

    def _judgements(self) -> dict[str, int]:
        """Of judgements also what they are about and who judged."""
        if self.kind not in RESPONSES:
            return {}
        rows = [record.values for record in self.kept]
        names = pair_names(rows) if self.kind == "votes" else {}
        subjects = {judged(self.kind, values, names) for values in rows}
        annotators = {values["annotator"] for values in rows} - {UNNAMED}
        return {"judged": len(subjects), "judged_again": len(rows) - len(subjects), "annotators": len(annotators)}


def totals(screenings: Iterable[Screening]) -> dict[str, Any]:
    """Counts over all kinds, and under `kinds` those of each."""
    screenings = list(screenings)
    rows, bad = (
        sum(screening.rows for screening in screenings),
        sum(len(screening.bad_entries) for screening in screenings),
    )
    return {
        "rows_in": rows,
        "rows_kept": sum(len(screening.kept) for screening in screenings),
        "rows_bad": bad,
        "rows_duplicate": sum(screening.count(DUPLICATE) for screening in screenings),
        "rows_revised": sum(screening.count(REVISED) for screening in screenings),
        "rows_warned": sum(len({(entry["line"], entry["item"]) for entry in one.warned}) for one in screenings),
        "bad_share": bad / rows,
        "kinds": {screening.kind: screening.metrics() for screening in screenings},
    }


def write_entries(folder: Path, screenings: Mapping[Kind, Screening]) -> None:
    """Write `quarantine.jsonl` and `warnings.jsonl`: one line a row set aside, one line a warning."""
    files = {
        "quarantine": [entry for screening in screenings.values() for entry in screening.quarantine],
        "warnings": [entry for screening in screenings.values() for entry in screening.warned],
    }
    for name, entries in files.items():
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
