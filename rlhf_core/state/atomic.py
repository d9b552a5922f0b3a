"""Files and folders that are either wholly there or not there at all."""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def canonical_json(value: Any) -> str:
    """Return JSON that is the same for equal values: sorted keys, no NaN, a newline at the end."""
    return json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that appears under its name only when all of it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_text(path: Path, content: str) -> None:
    """`write_bytes` for UTF-8 text."""
    write_bytes(path, content.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` for canonical JSON."""
    write_text(path, canonical_json(value))


def sync_folder(folder: Path) -> None:
    """Make renames and new names inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder` to the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)


def publish_folder(temporary: Path, final: Path) -> None:
    """Rename a finished folder to its final name, replacing what stood there.

    Both must lie on one filesystem. A kill in between leaves the old folder, none, or the new one, never a mixture.
    """
    sync_tree(temporary)
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        doomed = final.with_name(f".{final.name}.{os.getpid()}-{secrets.token_hex(4)}.old")
        final.rename(doomed)
        temporary.rename(final)
        shutil.rmtree(doomed)
    else:
        temporary.rename(final)
    sync_folder(final.parent)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`, by its relative POSIX path, in sorted order."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON-able value, in hex; equal values have equal digests."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


@contextmanager
def temporary_folder(parent: Path, label: str) -> Iterator[Path]:
    """Give a fresh folder below `parent` whose name tells its owner, and remove it afterwards where it still is."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / f".tmp-{label}-{os.getpid()}-{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep_temporary(parent: Path) -> None:
    """Remove `.tmp-*` folders below `parent` whose owning process no longer runs."""
    for folder in abandoned_folders(parent):
        shutil.rmtree(folder, ignore_errors=True)


def abandoned_folders(parent: Path) -> list[Path]:
    """The folders that `temporary_folder` made below `parent` for processes that no longer run."""
    owners = {folder: folder.name.rsplit("-", 2)[-2] for folder in sorted(parent.glob(".tmp-*"))}
    return [folder for folder, pid in owners.items() if not (pid.isdigit() and Path(f"/proc/{pid}").exists())]
