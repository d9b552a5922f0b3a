"""Where a model folder or a data file came from: a note in or beside it, written when it is fetched, for manifests."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from rlhf_core.errors import ConfigError
from rlhf_core.state.atomic import file_digest, tree_digest, write_json

NOTE = "provenance.json"
EXPORT_MANIFEST = "rlhf_manifest.json"
"""In a folder of `rlhf models export`: its files, and where they came from (`tasks/exporting/bundle.py`)."""

UNKNOWN = "unknown"
HUB = "hub:"


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """The origin of a folder. It holds no time and no place of this machine, so that it is the same for all who fetch.

    Attributes:
        source: as it was asked for: `hub:ORG/NAME@REVISION`, the name of a `.gguf` file or folder, `rlhf-policy/3`.
        commit: what the revision stood for; of a file or folder its SHA-256; of a registered version its content hash.
        licence: as its publisher names it, `unknown` where nobody says.
        files: SHA-256 of every file of the folder but this note.
        before: the note that the source itself carried, or where an exported folder says that it is from.
    """

    source: str
    commit: str
    licence: str = UNKNOWN
    files: Mapping[str, str] = field(default_factory=dict)
    before: Mapping[str, Any] | None = None


def write_provenance(folder: Path, source: str, commit: str, licence: str) -> Provenance:
    """Note in a folder where it came from, with the hashes of its files; a note that is there goes into the new one."""
    before = asdict(note) if (note := read_provenance(folder)) else exported_from(folder)
    files = {name: digest for name, digest in tree_digest(folder).items() if name != NOTE}
    note = Provenance(source=source, commit=commit, licence=licence, files=files, before=before)
    write_json(folder / NOTE, asdict(note))
    return note


def file_note_path(file: Path) -> Path:
    """Where the note of a data file lies: beside it."""
    return file.with_name(f"{file.name}.{NOTE}")


def write_file_note(file: Path, content: Path, **said: Any) -> dict[str, Any]:
    """Note beside a data file where its rows came from; `content` is the file as long as it has another name."""
    note = {**said, "sha256": file_digest(content)}
    write_json(file_note_path(file), note)
    return note


def read_file_note(file: Path) -> dict[str, Any] | None:
    """The note of a data file, and whether the file was `changed` since; None where it has none.

    Raises:
        ConfigError: there is one that cannot be read.
    """
    path = file_note_path(file)
    if not path.is_file():
        return None
    try:
        note: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return note | {"changed": file_digest(file) != note["sha256"]}
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path}: not a note of where the file came from ({error}). Fix: remove it") from error


def read_provenance(folder: Path) -> Provenance | None:
    """The note of a folder; None where it has none.

    Raises:
        ConfigError: there is one that cannot be read.
    """
    path = folder / NOTE
    if not path.is_file():
        return None
    try:
        return Provenance(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: not a note of where the folder came from ({error}). Fix: fetch it again") from error


def hub_source(note: Mapping[str, Any] | None) -> tuple[str, str] | None:
    """ORG/NAME and commit of a model that was fetched from a hub, itself or through copies; None for any other.

    Args:
        note: what `Provenance` says, as a manifest has it.
    """
    while note:
        if str(note.get("source", "")).startswith(HUB):
            return str(note["source"]).removeprefix(HUB).partition("@")[0], str(note["commit"])
        note = note.get("before")
    return None


def exported_from(folder: Path) -> dict[str, Any] | None:
    """Where an exported folder says that it is from; None for any other folder.

    Raises:
        ConfigError: it has a manifest that does not say so.
    """
    path = folder / EXPORT_MANIFEST
    if not path.is_file():
        return None
    try:
        said: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["provenance"]
        return asdict(Provenance(**said))
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path}: does not say where the folder came from ({error}). Fix: export it again") from error


def changed_since(folder: Path, note: Provenance) -> list[str]:
    """Files of a folder that are not as they were fetched: changed, added or gone."""
    now = {}
    for path in (one for one in folder.rglob("*") if one.is_file()):
        about = path.stat()
        now[path.relative_to(folder).as_posix()] = _digest(path, about.st_ino, about.st_size, about.st_mtime_ns)
    now.pop(NOTE, None)
    return sorted(name for name in now.keys() | note.files.keys() if now.get(name) != note.files.get(name))


@lru_cache(maxsize=1024)
def _digest(path: Path, *about: int) -> str:
    """SHA-256 of a file that is as it was: every model of a run is held against the same gigabytes."""
    return file_digest(path)
