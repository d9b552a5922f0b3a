"""What makes a folder an export: a manifest of every byte with the lineage, its signature, and how both are checked."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from rlhf_core.errors import ConfigError, EnvironmentProblem
from rlhf_core.state.atomic import file_digest, tree_digest, write_json
from tasks.exporting.signing import Signature, read_signature, sign
from tasks.lineage.provenance import EXPORT_MANIFEST, NOTE

SIGNATURE = "rlhf_manifest.sig"
SCHEMA = 1
BESIDE = (NOTE, ".gitattributes", ".cache/huggingface/")
"""What a fetch or a hub's client lays into a folder; no tool reads it as a part of the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """What a look at every byte of an exported folder found.

    Attributes:
        version: which registered version it says to be.
        files: how many files were compared.
        problems: a line for each file that is changed, missing or unexpected, and for a signature that does not hold.
        signature: None for an unsigned folder.
        beside: files that are no part of it, left by a fetch or a hub's client.
    """

    version: str
    files: int
    problems: tuple[str, ...]
    signature: Signature | None
    beside: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether every byte is as listed; says nothing of who listed it."""
        return not self.problems

    @property
    def proven(self) -> str:
        """In words, what the signature proves."""
        if self.signature is None:
            return "unsigned: whole as its own list says, but whoever changed a file could have changed the list"
        if not self.signature.holds:
            return f"signature of {self.signature.key} does not hold"
        if not self.signature.trusted:
            return f"signed by {self.signature.key}, a key that was not named as trusted: whose it is, is not known"
        return f"signed by {self.signature.key}, which is trusted"


class _Content(NamedTuple):
    files: Mapping[str, str]
    version: str
    problem: str = ""


def write_bundle(folder: Path, said: Mapping[str, Any], key: Ed25519PrivateKey | None) -> None:
    """Write the manifest, the last file of an export, and its signature where there is a key.

    Args:
        said: what the manifest holds beside `schema` and `files`.
    """
    write_json(folder / EXPORT_MANIFEST, {"schema": SCHEMA, **said, "files": tree_digest(folder)})
    if key is not None:
        write_json(folder / SIGNATURE, sign(key, (folder / EXPORT_MANIFEST).read_bytes()))


def verify_folder(folder: Path, trusted: tuple[Ed25519PublicKey, ...] = ()) -> Verified:
    """Look at every byte of an exported folder; asks nobody else.

    Raises:
        EnvironmentProblem: there is no such folder.
        ConfigError: it is no export.
    """
    if not folder.is_dir():
        raise EnvironmentProblem(f"{folder}: there is no such folder. Fix: a folder of rlhf models export")
    path = folder / EXPORT_MANIFEST
    if not path.is_file():
        raise ConfigError(f"{folder}: no {EXPORT_MANIFEST}, so nothing to hold it against. Fix: rlhf models export")
    raw = path.read_bytes()
    content = _content(raw)
    found, beside = _found(folder)
    problems = [content.problem] if content.problem else list(_differences(folder, content.files, found))
    signature = _signature(folder, raw, trusted)
    if signature is not None and not signature.holds:
        problems.append(f"{SIGNATURE}: not a signature of this {EXPORT_MANIFEST} by {signature.key}")
    return Verified(
        version=content.version,
        files=len(content.files),
        problems=tuple(problems),
        signature=signature,
        beside=tuple(beside),
    )


def read_manifest_file(folder: Path) -> dict[str, Any]:
    """The manifest of a folder that was verified."""
    content: dict[str, Any] = json.loads((folder / EXPORT_MANIFEST).read_text(encoding="utf-8"))
    return content


def _content(raw: bytes) -> _Content:
    try:
        manifest = json.loads(raw)
        files, version = manifest["files"], str(manifest["version"])
        if manifest["schema"] != SCHEMA:
            return _Content({}, version, f"{EXPORT_MANIFEST}: schema {manifest['schema']}, this program reads {SCHEMA}")
        names = [PurePosixPath(name) for name in files]
        if not all(isinstance(digest, str) for digest in files.values()):
            raise ValueError("a hash that is no text")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return _Content({}, "unknown", f"{EXPORT_MANIFEST}: not a manifest that can be read ({error})")
    if any(name.is_absolute() or ".." in name.parts for name in names):
        return _Content({}, version, f"{EXPORT_MANIFEST}: names files outside of the folder")
    return _Content(files, version)


def _found(folder: Path) -> tuple[set[str], list[str]]:
    """Names of all that is in a folder but manifest and signature, and of what is no part of it."""
    names, beside = set(), []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if (path.is_dir() and not path.is_symlink()) or name in (EXPORT_MANIFEST, SIGNATURE):
            continue
        if name in BESIDE or name.startswith(tuple(one for one in BESIDE if one.endswith("/"))):
            beside.append(name)
        else:
            names.add(name)
    return names, beside


def _differences(folder: Path, listed: Mapping[str, str], found: set[str]) -> list[str]:
    problems = []
    for name in sorted({*listed, *found}):
        if name not in listed:
            problems.append(f"{name}: not in the list")
        elif not (folder / name).is_file():
            problems.append(f"{name}: missing")
        elif file_digest(folder / name) != listed[name]:
            problems.append(f"{name}: changed")
    return problems


def _signature(folder: Path, raw: bytes, trusted: tuple[Ed25519PublicKey, ...]) -> Signature | None:
    path = folder / SIGNATURE
    if not path.is_file():
        return None
    try:
        said = json.loads(path.read_bytes())
    except ValueError:
        said = None
    return read_signature(said, raw, trusted)
