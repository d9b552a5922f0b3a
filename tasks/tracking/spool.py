"""A file of events on their way to the store: written first, sent after, each counted once.

`.rlhf/spool/<run>.jsonl` holds one JSON event a line and only grows; `<run>.position` holds how many of its bytes the
store has taken; `<run>.files/` keeps the files that events speak of, by hard link where that is possible;
`<run>.refused` holds events that the store would not take, each with the reason, until it does (`rlhf sync`).
"""

import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from rlhf_core.errors import ConfigError, EnvironmentProblem
from rlhf_core.state.atomic import sync_folder, write_text
from tasks import paths
from tasks.tracking.events import Event, Refusal, RunEvent, as_line, read_event, read_refusal

FOLDER = paths.STATE / "spool"
RUN_KEY_FORM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

T = TypeVar("T")


class Spool:
    """The events of one pipeline run. One writer at a time; readers may come and go.

    Args:
        home: main checkout.
        run_key: names the run; letters, digits, dot, dash, underscore.

    Raises:
        ConfigError: the key would not do as a file name.
    """

    def __init__(self, home: Path, run_key: str) -> None:
        if not RUN_KEY_FORM.fullmatch(run_key):
            raise ConfigError(
                f"run key {run_key!r}: not a plain name. Fix: letters, digits, dot, dash, underscore; at most 100"
            )
        self.run_key = run_key
        folder = home / FOLDER
        self.path = folder / f"{run_key}.jsonl"
        self.files = folder / f"{run_key}.files"
        self.refused = folder / f"{run_key}.refused"
        self._position = folder / f"{run_key}.position"

    def append(self, events: Iterable[Event]) -> None:
        """Add events and return once they are on the disk."""
        self._write(self.path, "".join(as_line(event) for event in events))

    def refuse(self, event: Event, reason: str) -> None:
        """Set aside an event that the store would not take, with the reason. The files it speaks of stay."""
        self._write(self.refused, as_line(Refusal(reason=reason, event=event)))

    def refusals(self) -> list[Refusal]:
        """What was set aside, the oldest first.

        Raises:
            EnvironmentProblem: a line is no refusal that this version knows.
        """
        return [_read(read_refusal, line, self.refused) for _, line in _whole_lines(self.refused, 0)]

    def keep_refused(self, refusals: Iterable[Refusal]) -> None:
        """Put what is still refused in the place of what was."""
        lines = "".join(as_line(refusal) for refusal in refusals)
        if lines:
            write_text(self.refused, lines)
        else:
            self.refused.unlink(missing_ok=True)

    def beginning_of(self, run: str) -> RunEvent | None:
        """The event that began a run, for a store that has lost it."""
        begun = (event for _, event in self.events() if isinstance(event, RunEvent))
        return next((event for event in begun if event.run == run), None)

    def events(self, start: int = 0) -> Iterator[tuple[int, Event]]:
        """Yield each whole event from byte `start` on, with the position behind it.

        Raises:
            EnvironmentProblem: a line is no event that this version knows.
        """
        for position, line in _whole_lines(self.path, start):
            yield position, _read(read_event, line, self.path)

    @property
    def position(self) -> int:
        """How many bytes of the file the store has taken."""
        return int(self._position.read_text()) if self._position.exists() else 0

    def advance(self, position: int) -> None:
        """Note that the store has taken everything before `position`."""
        write_text(self._position, f"{position}\n")

    def pending(self) -> int:
        """Number of events that the store has not taken, those that were set aside not counted."""
        return sum(1 for _ in _whole_lines(self.path, self.position))

    def set_aside(self) -> int:
        """Number of events that the store would not take."""
        return sum(1 for _ in _whole_lines(self.refused, 0))

    def keep(self, source: Path) -> str:
        """Keep a file or folder as it stands now, until `drop`; returns its path within `files`, never used before."""
        name = f"{secrets.token_hex(6)}/{source.name}"
        target = self.files / name
        if source.is_dir():
            for path in sorted(path for path in source.rglob("*") if path.is_file()):
                _link(path, target / path.relative_to(source))
        else:
            _link(source, target)
        return name

    def new_file(self, name: str) -> tuple[str, Path]:
        """`keep` for a file that the caller is yet to write: what `keep` would return, and where to write."""
        kept = f"{secrets.token_hex(6)}/{name}"
        (self.files / kept).parent.mkdir(parents=True)
        return kept, self.files / kept

    def drop(self, kept: str) -> None:
        """Forget what `keep` returned `kept` for."""
        shutil.rmtree((self.files / kept).parent, ignore_errors=True)

    def remove(self) -> None:
        """Drop everything, for a run that was sent wholly and is old."""
        shutil.rmtree(self.files, ignore_errors=True)
        for path in (self.path, self._position):
            path.unlink(missing_ok=True)

    @staticmethod
    def _write(path: Path, lines: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not path.exists()
        with path.open("ab") as file:
            _drop_torn_line(path, file.tell())
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
        if fresh:
            sync_folder(path.parent)


def spools(home: Path) -> list[Spool]:
    """Every spool of a checkout, the oldest first."""
    found = sorted((home / FOLDER).glob("*.jsonl"), key=lambda path: (path.stat().st_mtime, path.name))
    return [Spool(home, path.stem) for path in found]


def _whole_lines(path: Path, start: int) -> Iterator[tuple[int, bytes]]:
    """Each line from byte `start` on that ends in a newline, with the position behind it."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return
            start += len(line)
            yield start, line


def _read(read: Callable[[bytes], T], line: bytes, path: Path) -> T:
    try:
        return read(line)
    except ValueError as error:
        raise EnvironmentProblem(
            f"{path}: {line[:80].decode(errors='replace')!r} is no event that this version knows. "
            "Fix: rlhf sync with the version that recorded it"
        ) from error


def _drop_torn_line(path: Path, size: int) -> None:
    """Cut what a killed writer left after the last whole line: it was never acknowledged."""
    if size == 0:
        return
    with path.open("rb") as file:
        file.seek(size - 1)
        if file.read(1) == b"\n":
            return
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
    os.truncate(path, whole)


def _link(source: Path, target: Path) -> None:
    """Hard link, or copy where the filesystem has none: a published file is replaced, never written into."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
