"""Stage `validate`: read every record kind, check it, set bad rows aside, and write the tables all stages start from.

Duplicates and judgements that their annotator revised are set aside too, but do not count as bad: what counts instead
stands at the line that the quarantine names.
"""

import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_core.data.reading.judgements import RESPONSES, responses_of
from rlhf_core.data.reading.kinds import SPECS, Kind
from rlhf_core.data.reading.readers import Refused, Row, read_rows
from rlhf_core.data.reading.records import Record, place, to_record
from rlhf_core.errors import DataError
from rlhf_core.text.identity import prompt_group, seen_reply
from rlhf_core.text.normal import normal_form, visible
from tasks import paths
from tasks.frame.stage import Stage
from tasks.stages.notice import warn
from tasks.stages.validate.data_docs import write_data_docs
from tasks.stages.validate.expectations import Checked, check
from tasks.stages.validate.screening import REVISED, UNREADABLE, Screening, totals, write_entries
from tasks.stages.validate.sides import Sides
from tasks.stages.validate.suites import CheckedRow
from tasks.stages.validate.validated import write_tables

REFUSED = paths.STATE / "refused"
_LISTED = 5


def run(stage: Stage) -> dict[str, Any]:
    """Check every file of the data section; write the tables, `quarantine.jsonl`, `warnings.jsonl` and
    the Data Docs.

    Raises:
        DataError: a file cannot be read as a whole, has no good row or a larger share of bad rows than
            `validate.max_bad_share`, a training prompt is a held-out one too, or a later stage would have nothing to
            work on. What was written by then is kept under `.rlhf/refused/` for a look.
    """
    named: dict[Kind, str] = {kind: file for kind in SPECS if (file := getattr(stage.params.data, kind))}
    if not named:
        raise DataError("params.yaml: data: names no file. Fix: name at least demonstrations or comparisons")
    screenings: dict[Kind, Screening] = {}
    for step, (kind, file) in enumerate(named.items(), start=1):
        screening = screenings[kind] = judge(stage, kind, file)
        stage.log(step, len(named), {"validate/rows": screening.rows, "validate/bad": len(screening.bad_entries)}, 0)
    sides = Sides(screenings, stage.params.data)
    sides.set_aside()
    write_entries(stage.out, screenings)
    pages: dict[str, str] = {kind: screening.page for kind, screening in screenings.items() if screening.page}
    write_data_docs(stage.out / "data_docs", pages)
    refused = stage.root / REFUSED
    shutil.rmtree(refused, ignore_errors=True)
    try:
        for screening in screenings.values():
            _say_what_is_odd(stage, screening)
            _refuse_bad(screening, stage.params.validate_.max_bad_share)
        _refuse_leaks(screenings)
        sides.say(stage)
    except DataError:
        shutil.copytree(stage.out, refused)
        raise
    data = stage.params.data
    if data.heldout_share is None and data.hashed_share:
        share = f"{data.hashed_share:g} of the prompt groups are held out"
        warn(stage, f"data: names no heldout_prompts and no heldout_share: {share}")
    records = {kind: screening.kept for kind, screening in screenings.items()}
    tables = write_tables(stage.out, records, sides.split, sides.replies)
    return totals(screenings.values()) | {"tables": tables}


def judge(stage: Stage, kind: Kind, file: str) -> Screening:
    """Read and check one file."""
    screening = Screening(kind=kind, file=file)
    candidates: list[CheckedRow] = []
    for row in read_rows(Path(file)):
        if isinstance(row, Refused):
            screening.set_aside(row, row.reason, [UNREADABLE])
        else:
            record = to_record(kind, row)
            if (column := stage.params.data.split_by) is not None:
                _note_unit(record, row, column)
            if record.unreadable:
                screening.set_aside(record, record.unreadable, [UNREADABLE])
            else:
                candidates.append(CheckedRow(record=record, same_responses=_has_same_responses(record, kind)))
    if candidates:
        checked = check(kind, candidates, stage.params.validate_)
        screening.page = checked.page
        _sort_out(screening, candidates, checked)
    screening.quarantine.sort(key=lambda entry: (entry["line"], entry["item"] or 0))
    return screening


def _note_unit(record: Record, row: Row, column: str) -> None:
    """Keep what the row has in the column that splits are made by; the kind need not know the column."""
    value = row.value.get(column) if isinstance(row.value, dict) else None
    if value is not None and not isinstance(value, dict | list) and visible(str(value)):
        record.unit = str(value)
    record.unknown -= {column}


def _has_same_responses(record: Record, kind: Kind) -> bool:
    """Whether two of the responses that a row compares are the same to a reader."""
    texts = [normal_form(seen_reply(text)) for text in responses_of(kind, record.values)]
    return len(set(texts)) < len(texts)


def _sort_out(screening: Screening, candidates: list[CheckedRow], checked: Checked) -> None:
    for position, candidate in enumerate(candidates):
        record = candidate.record
        screening.unknown.update(record.unknown)
        findings = checked.findings.get(position, [])
        grounds = [finding for finding in findings if not finding.warning]
        for finding in findings:
            if finding.warning:
                screening.warn(record, finding.reason, finding.code)
        if grounds:
            reason = "; ".join(finding.reason for finding in grounds)
            screening.set_aside(record, reason, [finding.code for finding in grounds])
        else:
            screening.kept.append(record)


def _say_what_is_odd(stage: Stage, screening: Screening) -> None:
    """One line for each kind of warning, with the first place, and one for columns that are left out."""
    for code, count in sorted(Counter(entry["code"] for entry in screening.warned).items()):
        first = next(entry for entry in screening.warned if entry["code"] == code)
        where = f"{screening.file}: {place(first['line'], first['item'])}"
        warn(stage, f"{where}: {first['reason']} ({code}, {count} of {screening.rows} rows; all in warnings.jsonl)")
    if screening.unknown:
        names = ", ".join(f"{name!r} ({count} rows)" for name, count in sorted(screening.unknown.items())[:_LISTED])
        more = f" and {len(screening.unknown) - _LISTED} more" if len(screening.unknown) > _LISTED else ""
        warn(stage, f"{screening.file}: columns that {screening.kind} do not have are left out: {names}{more}")
    if revised := screening.count(REVISED):
        warn(
            stage, f"{screening.file}: {revised} judgements were revised by their annotator later; the last ones count"
        )


def _refuse_bad(screening: Screening, max_bad_share: float) -> None:
    if not screening.rows:
        raise DataError(f"{screening.file}: data.{screening.kind}: no rows. Fix: name a file with rows, or null")
    if (screening.kept or not screening.bad_entries) and screening.bad_share <= max_bad_share:
        return
    first, bad = screening.bad_entries[0], len(screening.bad_entries)
    reasons = ", ".join(f"{code} {count}" for code, count in screening.reasons.most_common(_LISTED))
    item = f"item {first['item']}: " if first["item"] else ""
    found = f"{bad} of {screening.rows} rows of data.{screening.kind} are bad ({reasons})"
    if screening.kept:
        consequence, cure = f", more than validate.max_bad_share {max_bad_share:g} allows", ", or raise the share"
    else:
        consequence, cure = ", so that none is left", ""
    if any(f"{name}.empty" in screening.reasons for name in RESPONSES.get(screening.kind, ())):
        cure += ", or keep empty replies that people judged (validate.keep_empty_responses: true)"
    raise DataError(
        f"{screening.file}:{first['line']}: {item}{first['reason']}; {found}{consequence}. "
        f"Fix: mend the rows listed in {REFUSED}/quarantine.jsonl{cure}"
    )


def _refuse_leaks(screenings: Mapping[Kind, Screening]) -> None:
    """Training files must not hold a prompt of the held-out file, whatever its case and white space.

    Comparisons, votes and grades may: those on held-out prompts are kept apart by their `split`.
    """
    heldout = screenings.get("heldout_prompts")
    if heldout is None:
        return
    places = {prompt_group(record.values["prompt"]): record for record in heldout.kept}
    for kind in ("prompts", "demonstrations"):
        screening = screenings.get(kind)
        leaks = [
            (record, places[group])
            for record in (screening.kept if screening else ())
            if (group := prompt_group(record.values["prompt"])) in places
        ]
        if screening and leaks:
            pairs = ", ".join(f"{here.place} = {heldout.file}:{there.line}" for here, there in leaks[:_LISTED])
            more = f" and {len(leaks) - _LISTED} more" if len(leaks) > _LISTED else ""
            at = f"{screening.file}:{leaks[0][0].line}"
            raise DataError(
                f"{at}: prompt: {len(leaks)} prompts are held-out ones too: {pairs}{more}. "
                "Fix: take them out of one of the two files"
            )
