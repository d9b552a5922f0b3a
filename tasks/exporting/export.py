"""A registered version exported: written in a form of its own, read back by a stranger, described, listed, signed."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from rlhf_core.errors import ConfigError, GateRefused
from rlhf_core.state.atomic import publish_folder, temporary_folder, tree_digest, write_text
from tasks.exporting.bundle import read_manifest_file, verify_folder, write_bundle
from tasks.exporting.card import Card, lock_digest, parents_of
from tasks.exporting.form import Order, WrittenForm
from tasks.exporting.formats import FORMATS, Format
from tasks.exporting.parity import Parity
from tasks.exporting.prompts import texts_to_try
from tasks.exporting.subject import FormatName, Numbers, Subject
from tasks.lineage.provenance import Provenance

CARD = "README.md"


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """How a version is to be exported.

    Attributes:
        format: one of `FORMATS`.
        numbers: float32, or float16 where the format has it.
        prompts: file with the prompts to try it on; None for those that the run held out.
        key: signs the manifest; None leaves it unsigned.
        licence: of the exported model; None for that of its pretrained model.
    """

    format: FormatName = "hf"
    numbers: Numbers = "float32"
    prompts: Path | None = None
    key: Ed25519PrivateKey | None = None
    licence: str | None = None


def export(subject: Subject, folder: Path, wish: Wish, tell: Callable[[str], None]) -> Mapping[str, Any]:
    """Make `folder`, whole and checked, or leave nothing; returns its manifest.

    A folder that is this very export already is left as it is.

    Args:
        tell: gets a line before each step that takes its time.

    Raises:
        ConfigError: the folder is something else, or the version has no such form.
        GateRefused: what was read back is not the version.
        EnvironmentProblem, DataError: the prompts are gone or cannot be read, or a package is missing.
    """
    form = _chosen(subject, wish)
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        return _same(subject, folder, wish)
    with temporary_folder(folder.parent, f"export-{folder.name}") as scratch:
        made = scratch / folder.name
        made.mkdir()
        _fill(subject, made, wish, form, tell)
        if folder.exists():  # meanwhile somebody else made one
            return _same(subject, folder, wish)
        publish_folder(made, folder)
    return read_manifest_file(folder)


def _fill(subject: Subject, made: Path, wish: Wish, form: Format, tell: Callable[[str], None]) -> None:
    texts = texts_to_try(subject, wish.prompts)
    tell(f"writing {subject.reference} as {wish.format}")
    written, parity = form.make(Order(subject=subject, numbers=wish.numbers, texts=texts, tell=tell), made)
    if not parity.holds:
        raise GateRefused(
            f"{subject.reference}: as {wish.format} it is another model: {parity}. Nothing was written. "
            "Fix: another --format; where prompts are encoded otherwise, its tokenizer is not one of that format"
        )
    _describe(subject, made, wish, written, parity)


def _describe(subject: Subject, made: Path, wish: Wish, written: WrittenForm, parity: Parity) -> None:
    """Card, manifest and signature."""
    licence = wish.licence or subject.licence
    card = Card(
        subject=subject,
        format=wish.format,
        licence=licence,
        parity=parity,
        limits=written.limits,
        loading=written.loading,
    )
    write_text(made / CARD, card.text())
    note = Provenance(
        source=subject.reference, commit=subject.content, licence=licence, files=tree_digest(made),
        before=_without_key(subject.pretrained),
    )  # fmt: skip
    said = {
        "version": subject.reference,
        "content": subject.content,
        "format": wish.format,
        "numbers": wish.numbers,
        "provenance": asdict(note) | {"files": {}},  # they stand in the manifest itself
        "lineage": _lineage(subject),
        "parity": asdict(parity),
        "gates": [asdict(gate) for gate in subject.gates],
        "metrics": dict(subject.metrics),
        **written.said,
    }
    write_bundle(made, said, wish.key)


def _lineage(subject: Subject) -> dict[str, Any]:
    manifest = subject.manifest
    return {
        "stage": subject.stage,
        "git": manifest["git"],
        "dvc_lock": manifest["dvc_lock"],
        "dvc_lock_sha256": lock_digest(manifest),
        "params": manifest["params"],
        "params_hash": manifest["params_hash"],
        "data_hash": manifest["data_hash"],
        "environment": manifest["environment"],
        "parents": parents_of(subject),
        "model_folders": manifest.get("model_folders", {}),
        "data_files": manifest.get("data_files", {}),
    }


def _without_key(note: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The note of a pretrained folder as `Provenance` has it; None where nobody noted what it is."""
    if note is None or "commit" not in note:
        return None
    return {name: note[name] for name in ("source", "commit", "licence", "before") if name in note}


def _chosen(subject: Subject, wish: Wish) -> Format:
    form = FORMATS.get((subject.kind, wish.format))
    if form is None:
        raise ConfigError(f"{subject.reference}: a {subject.kind} model has no form {wish.format}. Fix: --format hf")
    if wish.numbers not in form.numbers:
        raise ConfigError(f"--numbers {wish.numbers}: {wish.format} is written in {', '.join(form.numbers)}. Fix: one")
    return form


def _same(subject: Subject, folder: Path, wish: Wish) -> Mapping[str, Any]:
    """The manifest of a folder that is there, where it is this export, untouched.

    Raises:
        ConfigError: it is something else.
    """
    found = verify_folder(folder) if folder.is_dir() else None
    said = read_manifest_file(folder) if found is not None and found.is_whole else {}
    wanted = {"version": subject.reference, "content": subject.content, "format": wish.format, "numbers": wish.numbers}
    if {name: said.get(name) for name in wanted} != wanted:
        why = "; ".join(found.problems[:3]) if found and found.problems else f"it is {said.get('version', 'no export')}"
        raise ConfigError(f"{folder}: is there already, and {why}. Fix: another name, or remove the folder")
    if wish.key is not None and (found is None or found.signature is None):
        raise ConfigError(f"{folder}: is there already, unsigned. Fix: another name, or remove the folder")
    return said
