"""Rows of data files, each with its line and the SHA-256 of its raw bytes; `READERS` says which formats there are.

A row that cannot be read is yielded as `Refused` and reading goes on; only what spoils the whole file is raised.
Plain and gzipped files are told apart by their first bytes, the format by the name.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_core.data.reading.lines import MAX_LINE_BYTES, RawLine, changed, fingerprint, read_lines
from rlhf_core.data.reading.strict_json import StrictDecoder, row_faults
from rlhf_core.errors import DataError
from rlhf_core.text.normal import visible

MAX_JSON_BYTES = 512 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A row as it stands in the file.

    `line` counts from 1; it is the row number in Parquet, and the first line of a row that spans several. `item` counts
    the rows of a JSON array, several of which may stand on one line; it is null in the other formats. `textual` says
    that the format (CSV) knows only text, so numbers have yet to be read out of it. `faults` says why single columns
    cannot be read, which is no harm where nobody reads them.
    """

    line: int
    sha256: str
    value: Any
    textual: bool = False
    item: int | None = None
    faults: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A row that cannot be read, and why."""

    line: int
    sha256: str
    reason: str
    item: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """A format of data files.

    Attributes:
        rows: of a file and the most bytes that a row may have, every row, or why it is refused; blank lines are none.
        docs: one line for the reference page.
        gzipped: it is also read where it is gzipped, under a name with `.gz` behind.
    """

    rows: Callable[[Path, int], Iterator[Row | Refused]]
    docs: str
    gzipped: bool = True


def read_rows(path: Path, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[Row | Refused]:
    """Yield every row of a file in one of the formats of `READERS`.

    Blank lines are no rows. JSONL, CSV and Parquet are streamed; a JSON array is held as a whole. JSONL yields any
    JSON value; the other formats yield objects.

    Raises:
        DataError: the format is unknown, or the file as a whole cannot be read.
    """
    return READERS[format_suffix(path).removesuffix(_GZIPPED)].rows(path, max_line_bytes)


def format_suffix(path: Path) -> str:
    """How a file of this file's format is named: its last suffix in lower case, with `.gz` behind it if it has that.

    Raises:
        DataError: no format has this name.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    gzipped = _GZIPPED if suffixes[-1:] == [_GZIPPED] else ""
    if gzipped:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    if suffix not in READERS or (gzipped and not READERS[suffix].gzipped):
        known = ", ".join(sorted(READERS))
        plain = ", ".join(sorted(name for name, reader in READERS.items() if not reader.gzipped))
        shown = repr(suffix + gzipped) if suffix else "without suffix"
        raise DataError(f"{path}: unknown format {shown}. Fix: use one of {known}, all but {plain} also with .gz")
    return suffix + gzipped


def _read_jsonl(path: Path, cap: int) -> Iterator[Row | Refused]:
    decoder = StrictDecoder()
    for line in read_lines(path, cap):
        text, fault = _decode_utf8(line, cap)
        value = None
        if fault is None:
            text = text.lstrip("\ufeff \t\r")  # of files put one behind the other each may bring a byte order mark
            if not text:
                continue
            value, fault = decoder.decode_line(text)
            if fault is not None and fault.startswith("not JSON") and not line.ended:
                fault = f"last line is cut off ({fault})"
        yield _row(line.number, line.sha256, value, fault)


def _read_json(path: Path, cap: int) -> Iterator[Row | Refused]:
    pieces, size = [], 0
    for line in read_lines(path, MAX_JSON_BYTES):
        size += line.size
        if size > MAX_JSON_BYTES:
            raise DataError(f"{path}: larger than {MAX_JSON_BYTES >> 20} MiB. Fix: use .jsonl, which is streamed")
        pieces.append(line.content)
    text = b"\n".join(pieces).decode("utf-8", errors="surrogateescape")
    yield from _json_items(path, text, cap)


def _json_items(path: Path, text: str, cap: int) -> Iterator[Row | Refused]:
    decoder = StrictDecoder()
    position = _skip_blanks(text, 0)
    if text[position : position + 1] != "[":
        raise DataError(f"{path}:1: not an array of objects. Fix: wrap the rows in [ ], or name the file .jsonl")
    position, line, counted, item = _skip_blanks(text, position + 1), 1, 0, 0
    while text[position : position + 1] != "]":
        line, counted, item = line + text.count("\n", counted, position), position, item + 1
        try:
            value, end = decoder.decode(text, position)
        except ValueError as error:
            raise DataError(
                f"{path}:{line}: item {item}: not JSON: {error}. Fix: repair the array from here on"
            ) from None
        raw = text[position:end].encode("utf-8", errors="surrogateescape")
        fault = _too_long(len(raw), cap) if len(raw) > cap else None
        yield _row(line, hashlib.sha256(raw).hexdigest(), value, fault, item=item)
        position = _skip_blanks(text, end)
        if text[position : position + 1] == ",":
            position = _skip_blanks(text, position + 1)
        elif text[position : position + 1] != "]":
            raise DataError(
                f"{path}:{line}: item {item}: the array is cut off, or a comma is missing. Fix: repair the file"
            )
    if _skip_blanks(text, position + 1) != len(text):
        raise DataError(f"{path}: more text after the array. Fix: keep one array a file")


def _skip_blanks(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\r", "\n"):
        position += 1
    return position


class _CsvLines:
    """Feeds `csv.reader` and remembers the raw lines of the record in hand."""

    def __init__(self, path: Path, cap: int) -> None:
        self._path, self._cap = path, cap
        self._lines = read_lines(path, cap)
        self.taken: list[RawLine] = []

    def __iter__(self) -> "_CsvLines":
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.taken.append(line)
        if sum(taken.size for taken in self.taken) > self._cap:
            place = f"{self._path}:{self.taken[0].number}"
            raise DataError(
                f"{place}: a row is longer than {self._cap} bytes. Fix: close its quoted cell, or shorten it"
            )
        return line.content.decode("utf-8", errors="surrogateescape") + "\n"


def _read_csv(path: Path, cap: int) -> Iterator[Row | Refused]:
    lines = _CsvLines(path, cap)
    csv.field_size_limit(max(cap, csv.field_size_limit()))
    cells = csv.reader(lines, strict=True)
    header: list[str] | None = None
    while True:
        lines.taken = []
        fault = None
        try:
            record = next(cells)
        except StopIteration:
            return
        except csv.Error as error:
            record, fault = [], f"not CSV: {error}"
        if not record and fault is None:
            continue
        if header is None:
            header = _csv_header(path, record, fault)
            continue
        digest = hashlib.sha256(b"\n".join(line.content for line in lines.taken)).hexdigest()
        if fault is None and len(record) != len(header):
            fault = f"{len(record)} cells where the header has {len(header)}"
        value = dict(zip(header, record, strict=False))
        yield _row(lines.taken[0].number, digest, value, fault, textual=True)


def _csv_header(path: Path, record: list[str], fault: str | None) -> list[str]:
    if fault:
        raise DataError(f"{path}:1: {fault}. Fix: end lines with a line feed, and close quoted cells")
    names = [visible(name) for name in record]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path}:1: column {twice[0]!r} stands twice. Fix: give each column one name in the first line")
    return names


def _read_parquet(path: Path, cap: int) -> Iterator[Row | Refused]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    before = fingerprint(path)
    line = 0
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise DataError(f"{path}: column {twice[0]!r} stands twice. Fix: give each column one name")
            for batch in file.iter_batches(1024):
                for value in batch.to_pylist():
                    line += 1
                    raw = json.dumps(value, sort_keys=True, default=repr).encode()
                    fault = _too_long(len(raw), cap) if len(raw) > cap else None
                    yield _row(line, hashlib.sha256(raw).hexdigest(), value, fault)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        problem = str(error).splitlines()[0]
        raise DataError(f"{path}:{line + 1}: not readable as Parquet ({problem}). Fix: write it again") from None
    if fingerprint(path) != before:
        raise changed(path)


def _decode_utf8(line: RawLine, cap: int) -> tuple[str, str | None]:
    if line.size > cap:
        return "", _too_long(line.size, cap)
    try:
        return line.content.decode("utf-8"), None
    except UnicodeDecodeError as error:
        byte = line.content[error.start]
        return "", f"byte 0x{byte:02x} at offset {error.start} of the line is not valid UTF-8"


def _too_long(size: int, cap: int) -> str:
    return f"{size} bytes long, more than the {cap} allowed"


def _row(
    line: int, sha256: str, value: Any, fault: str | None, *, textual: bool = False, item: int | None = None
) -> Row | Refused:
    fault, faults = (fault, {}) if fault is not None else row_faults(value)
    if fault is not None:
        return Refused(line=line, sha256=sha256, reason=fault, item=item)
    return Row(line=line, sha256=sha256, value=value, textual=textual, item=item, faults=faults)


_GZIPPED = ".gz"
READERS: Mapping[str, Reader] = {
    ".jsonl": Reader(rows=_read_jsonl, docs="one JSON value a line"),
    ".ndjson": Reader(rows=_read_jsonl, docs="the same, under its other name"),
    ".json": Reader(rows=_read_json, docs="one array of objects, at most 512 MiB"),
    ".csv": Reader(rows=_read_csv, docs="the first line names the columns"),
    ".parquet": Reader(rows=_read_parquet, docs="row groups are streamed", gzipped=False),
}
"""The formats, by the suffix of the name."""
