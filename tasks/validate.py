"""Stage `validate`: read every record kind, check it, set bad rows aside, and write the tables all stages start from.

Duplicates are set aside too, but do not count as bad: the item is still there, at the line that the quarantine names.
"""

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_core.data.identity import prompt_group
from rlhf_core.data.normal import normal_form
from rlhf_core.data.readers import Refused, read_rows
from rlhf_core.data.records import SPECS, Kind, Record, content_id, to_record
from rlhf_core.errors import DataError
from tasks import paths
from tasks.data_docs import write_data_docs
from tasks.expectations import Candidate, Checked, check
from tasks.stage import Stage
from tasks.validated import write_tables

DUPLICATE = "row.duplicate"
UNREADABLE = "row.unreadable"
REFUSED = paths.STATE / "refused"
_LISTED = 5
_COMPARED: Mapping[Kind, tuple[str, ...]] = {
    "comparisons": ("chosen", "rejected"),
    "votes": ("response_a", "response_b"),
    "rankings": ("responses",),
}
"""Where the responses stand that a row compares with each other."""


@dataclass(kw_only=True, slots=True)
class Verdict:
    """What validation says of one record kind."""

    kind: Kind
    file: str
    kept: list[Record] = field(default_factory=list)
    quarantine: list[dict[str, Any]] = field(default_factory=list)
    duplicates: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    warnings: Counter[str] = field(default_factory=Counter)
    unknown: set[str] = field(default_factory=set)
    page: str = ""  # empty where no row could be read, so that none was checked

    @property
    def bad(self) -> int:
        """Rows set aside for another reason than being there twice."""
        return len(self.quarantine) - self.duplicates

    @property
    def rows(self) -> int:
        """Rows read."""
        return len(self.kept) + len(self.quarantine)

    @property
    def bad_share(self) -> float:
        """Bad rows over rows; 0 for an empty file."""
        return self.bad / self.rows if self.rows else 0.0

    def metrics(self) -> dict[str, Any]:
        """Counts of this kind; a row with two reasons counts under both."""
        return {
            "rows_in": self.rows,
            "rows_kept": len(self.kept),
            "rows_bad": self.bad,
            "rows_duplicate": self.duplicates,
            "bad_share": self.bad_share,
            "reasons": dict(sorted(self.reasons.items())),
            "warnings": dict(sorted(self.warnings.items())),
            "unknown_fields": sorted(self.unknown),
        }


def run(stage: Stage) -> dict[str, Any]:
    """Check every file of the data section; write the tables, `quarantine.jsonl` and the Data Docs.

    Raises:
        DataError: a file cannot be read as a whole, has no good row or a larger share of bad rows than
            `validate.max_bad_share`, a training prompt is a held-out one too, or a later stage would have nothing to
            work on. What was written by then is kept under `.rlhf/refused/` for a look.
    """
    named: dict[Kind, str] = {kind: file for kind in SPECS if (file := getattr(stage.params.data, kind))}
    if not named:
        raise DataError("params.yaml: data: names no file. Fix: name at least demonstrations or comparisons")
    verdicts: dict[Kind, Verdict] = {}
    for step, (kind, file) in enumerate(named.items(), start=1):
        verdicts[kind] = judge(stage, kind, file)
        stage.log(step, len(named), {"validate/rows": verdicts[kind].rows, "validate/bad": verdicts[kind].bad}, 0)
    _write_quarantine(stage.out / "quarantine.jsonl", verdicts)
    pages: dict[str, str] = {kind: verdict.page for kind, verdict in verdicts.items() if verdict.page}
    write_data_docs(stage.out / "data_docs", pages)
    refused = stage.root / REFUSED
    shutil.rmtree(refused, ignore_errors=True)
    try:
        for verdict in verdicts.values():
            _refuse_bad(verdict, stage.params.validate_.max_bad_share)
        _refuse_leaks(verdicts)
    except DataError:
        shutil.copytree(stage.out, refused)
        raise
    records = {kind: verdict.kept for kind, verdict in verdicts.items()}
    tables = write_tables(stage.out, records, stage.params.data.heldout_share)
    return _totals(verdicts) | {"tables": tables}


def judge(stage: Stage, kind: Kind, file: str) -> Verdict:
    """Read and check one file."""
    verdict = Verdict(kind=kind, file=file)
    candidates: list[Candidate] = []
    seen = _Seen(kind)
    for row in read_rows(Path(file)):
        if isinstance(row, Refused):
            verdict.quarantine.append(_quarantined(verdict, row.line, row.sha256, row.reason, [UNREADABLE]))
            verdict.reasons[UNREADABLE] += 1
        else:
            candidates.append(seen.compare(to_record(kind, row)))
    if candidates:
        checked = check(kind, candidates, stage.params.validate_)
        verdict.page = checked.page
        _sort_out(verdict, candidates, checked)
    verdict.quarantine.sort(key=lambda entry: entry["line"])
    return verdict


class _Seen:
    """Finds rows that repeat an earlier item, or its id for another item."""

    def __init__(self, kind: Kind) -> None:
        self._kind = kind
        self._id_field = "pair_id" if kind == "votes" else "id"
        self._items: dict[str, int] = {}
        self._ids: dict[str, tuple[str, int]] = {}

    def compare(self, record: Record) -> Candidate:
        identity = record.identity()
        first = self._items.setdefault(identity, record.line)
        candidate = Candidate(record=record, duplicate_of=first if first != record.line else None)
        name = record.values[self._id_field]
        if name is not None:
            owner, line = self._ids.setdefault(name, (self._owner(record, identity), record.line))
            candidate.id_taken_at = line if owner != self._owner(record, identity) else None
        candidate.same_responses = self._repeats_a_response(record)
        return candidate

    def _repeats_a_response(self, record: Record) -> bool:
        values = [record.values[name] for name in _COMPARED.get(self._kind, ())]
        texts = [text for value in values for text in (value if isinstance(value, list) else [value]) if text]
        return len({normal_form(text) for text in texts}) < len(texts)

    def _owner(self, record: Record, identity: str) -> str:
        """What an id stands for: the item, or for votes the pair in either order, whoever voted."""
        if self._kind != "votes":
            return identity
        prompt, *responses = (repr(record.values[name]) for name in ("prompt", "response_a", "response_b"))
        return content_id(prompt, *sorted(responses))


def _sort_out(verdict: Verdict, candidates: list[Candidate], checked: Checked) -> None:
    kept: set[str] = set()
    for position, candidate in enumerate(candidates):
        record = candidate.record
        verdict.unknown |= record.unknown
        findings = checked.findings.get(position, [])
        verdict.warnings.update(finding.code for finding in findings if finding.warning)
        grounds = [finding for finding in findings if not finding.warning]
        codes = [finding.code for finding in grounds]
        identity = record.identity()
        # A row whose only fault is an earlier, bad row of the same item takes that one's place.
        if not grounds or (codes == [DUPLICATE] and identity not in kept):
            kept.add(identity)
            verdict.kept.append(record)
            continue
        verdict.reasons.update(codes)
        verdict.duplicates += codes == [DUPLICATE]
        reason = "; ".join(finding.reason for finding in grounds)
        verdict.quarantine.append(_quarantined(verdict, record.line, record.sha256, reason, codes))


def _quarantined(verdict: Verdict, line: int, sha256: str, reason: str, codes: list[str]) -> dict[str, Any]:
    place = {"kind": verdict.kind, "file": verdict.file, "line": line}
    return place | {"reason": reason, "codes": codes, "sha256": sha256}


def _write_quarantine(path: Path, verdicts: Mapping[Kind, Verdict]) -> None:
    entries = [entry for verdict in verdicts.values() for entry in verdict.quarantine]
    path.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries), encoding="utf-8")


def _refuse_bad(verdict: Verdict, max_bad_share: float) -> None:
    if not verdict.rows:
        raise DataError(f"{verdict.file}: data.{verdict.kind}: no rows. Fix: name a file with rows, or null")
    if verdict.kept and verdict.bad_share <= max_bad_share:
        return
    first = next(entry for entry in verdict.quarantine if entry["codes"] != [DUPLICATE])
    reasons = ", ".join(f"{code} {count}" for code, count in verdict.reasons.most_common(_LISTED))
    raise DataError(
        f"{verdict.file}:{first['line']}: {first['reason']}; {verdict.bad} of {verdict.rows} rows of "
        f"data.{verdict.kind} are bad ({reasons}), more than validate.max_bad_share {max_bad_share:g} allows. "
        f"Fix: mend the rows listed in {REFUSED}/quarantine.jsonl, or raise the share"
    )


def _refuse_leaks(verdicts: Mapping[Kind, Verdict]) -> None:
    """Training files must not hold a prompt of the held-out file, whatever its case and white space.

    Comparisons, votes and grades may: those on held-out prompts are kept apart by their `split`.
    """
    heldout = verdicts.get("heldout_prompts")
    if heldout is None:
        return
    lines = {prompt_group(record.values["prompt"]): record.line for record in heldout.kept}
    for kind in ("prompts", "demonstrations"):
        verdict = verdicts.get(kind)
        leaks = [
            (record.line, lines[group])
            for record in (verdict.kept if verdict else ())
            if (group := prompt_group(record.values["prompt"])) in lines
        ]
        if verdict and leaks:
            pairs = ", ".join(f"line {here} = {heldout.file}:{there}" for here, there in leaks[:_LISTED])
            more = f" and {len(leaks) - _LISTED} more" if len(leaks) > _LISTED else ""
            raise DataError(
                f"{verdict.file}:{leaks[0][0]}: prompt: {len(leaks)} prompts are held-out ones too: {pairs}{more}. "
                "Fix: take them out of one of the two files"
            )


def _totals(verdicts: Mapping[Kind, Verdict]) -> dict[str, Any]:
    rows, bad = sum(v.rows for v in verdicts.values()), sum(v.bad for v in verdicts.values())
    return {
        "rows_in": rows,
        "rows_kept": sum(len(v.kept) for v in verdicts.values()),
        "rows_bad": bad,
        "rows_duplicate": sum(v.duplicates for v in verdicts.values()),
        "bad_share": bad / rows,
        "kinds": {kind: verdict.metrics() for kind, verdict in verdicts.items()},
    }
