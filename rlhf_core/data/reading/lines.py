"""Raw lines of a file: counted from 1, cut at `\\n` only, hashed, and never larger in memory than the cap."""

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rlhf_core.errors import DataError

MAX_LINE_BYTES = 4 * 2**20
MAX_EXPANSION = 250  # text compresses 3 to 15 fold; a gzip bomb about 1,000 fold
_FREE_EXPANSION = 64 * 2**20
_CHUNK = 1 << 18
_UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True, slots=True)
class RawLine:
    """One line without its end (`\\n`, `\\r\\n`). `content` is empty where `size` is over the cap."""

    number: int
    content: bytes
    size: int
    sha256: str
    ended: bool  # False only for a last line without a line end


def read_lines(path: Path, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[RawLine]:
    """Yield the lines of a plain or gzipped file.

    A UTF-8 byte order mark is dropped. A line longer than `max_line_bytes` is hashed but not kept.

    Raises:
        DataError: the file is missing, changes while it is read, is UTF-16 or UTF-32, is a broken gzip stream,
            or expands like a bomb.
    """
    before = fingerprint(path)
    number, pending = 1, _Pending(max_line_bytes)
    try:
        for index, chunk in enumerate(_chunks(path)):
            if index == 0:
                _refuse_wide_encodings(path, chunk)
                chunk = chunk.removeprefix(_UTF8_BOM)
            *ended, rest = chunk.split(b"\n")
            for piece in ended:
                pending.add(piece)
                yield pending.line(number, ended=True)
                number, pending = number + 1, _Pending(max_line_bytes)
            pending.add(rest)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}:{number}: broken gzip stream ({error}). Fix: fetch or compress it again") from None
    if pending.size:
        yield pending.line(number, ended=False)
    if fingerprint(path) != before:
        raise changed(path)


def changed(path: Path) -> DataError:
    """What to raise when a file is not what it was when reading began."""
    return DataError(f"{path}: the file changed while it was read. Fix: run again when nothing writes to it")


class _Pending:
    """A line whose end has not been seen yet."""

    def __init__(self, cap: int) -> None:
        self.size = 0
        self._cap = cap
        self._pieces: list[bytes] = []
        self._hash = hashlib.sha256()
        self._held_return = False

    def add(self, piece: bytes) -> None:
        if not piece:
            return
        self.size += len(piece)
        # A carriage return at the end may belong to the line end, which is not hashed.
        body = b"\r" + piece if self._held_return else piece
        self._held_return = body.endswith(b"\r")
        body = body[:-1] if self._held_return else body
        self._hash.update(body)
        if self.size <= self._cap + 1:
            self._pieces.append(body)
        else:
            self._pieces.clear()

    def line(self, number: int, *, ended: bool) -> RawLine:
        size = self.size - self._held_return
        content = b"".join(self._pieces) if size <= self._cap else b""
        return RawLine(number=number, content=content, size=size, sha256=self._hash.hexdigest(), ended=ended)


def fingerprint(path: Path) -> tuple[int, int]:
    """Size and time of last change of a file, by which a change while it is read shows.

    Raises:
        DataError: there is no such file.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Fix: name an existing one in section data, or `dvc pull`") from None
    if not path.is_file():
        raise DataError(f"{path}: not a file. Fix: name one file, not a folder")
    return status.st_size, status.st_mtime_ns


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as packed:
        gzipped = packed.read(2) == b"\x1f\x8b"
        packed.seek(0)
        source: IO[bytes] = gzip.GzipFile(fileobj=packed) if gzipped else packed  # type: ignore[assignment]
        allowed = MAX_EXPANSION * path.stat().st_size + _FREE_EXPANSION
        total = 0
        while chunk := source.read(_CHUNK):
            total += len(chunk)
            if gzipped and total > allowed:
                raise DataError(
                    f"{path}: expands more than {MAX_EXPANSION}-fold. Fix: decompress it yourself if you trust it"
                )
            yield chunk


def _refuse_wide_encodings(path: Path, start: bytes) -> None:
    wide = start.startswith((b"\xff\xfe", b"\xfe\xff")) or start[:1] == b"\0" or start[1:2] == b"\0"
    if wide:
        raise DataError(f"{path}:1: the file is UTF-16 or UTF-32. Fix: iconv -f UTF-16 -t UTF-8 {path.name}")
