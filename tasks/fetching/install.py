"""A folder under models/ that appears whole or not at all, with its note of where it came from."""

import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from filelock import FileLock

from rlhf_core.errors import ConfigError, EnvironmentProblem
from rlhf_core.model_folder import check_model_folder
from rlhf_core.state.atomic import publish_folder
from tasks.fetching.source import Source
from tasks.lineage.provenance import Provenance, changed_since, read_provenance, write_provenance

MODELS = Path("models")
MIB = 2**20


def already_there(home: Path, name: str, source: Source, commit: str) -> Provenance | None:
    """The note of models/NAME where it is this very commit, untouched; None where there is no such folder.

    Raises:
        ConfigError: the folder is something else, or was changed since it was fetched.
    """
    folder = home / MODELS / name
    if not folder.exists():
        return None
    note = read_provenance(folder)
    if note is None or (note.source, note.commit) != (str(source), commit):
        origin = f"it is {note.source} at {note.commit[:12]}" if note else "nobody noted what it is"
        raise ConfigError(f"{MODELS / name}: is there already, and {origin}. Fix: another name, or remove the folder")
    if changed := changed_since(folder, note):
        raise ConfigError(
            f"{MODELS / name}: {', '.join(changed[:5])} {'is' if len(changed) == 1 else 'are'} not as fetched. "
            "Fix: another name, or remove the folder"
        )
    return note


def check_room(home: Path, needed: int) -> None:
    """Refuse a fetch that the disk has no room for.

    Raises:
        EnvironmentProblem: says how much is missing.
    """
    free = shutil.disk_usage(home).free
    if needed > free:
        raise EnvironmentProblem(
            f"{home / MODELS}: it takes {needed / MIB:,.0f} MiB, {free / MIB:,.0f} are free. Fix: free some space"
        )


def install(home: Path, name: str, source: Source, commit: str, fill: Callable[[Path], str]) -> Provenance:
    """Make models/NAME: filled beside it, checked, noted, then renamed. What is broken off is never seen there.

    Args:
        home: the main checkout.
        name: of the folder.
        source, commit: for the note.
        fill: writes the files into the folder that it is given; returns their licence.

    Raises:
        ConfigError, EnvironmentProblem: as `fill` and `check_model_folder` do; nothing is left behind but a cache.
    """
    models = home / MODELS
    models.mkdir(exist_ok=True)
    begun = models / f".{name}.fetching"
    with FileLock(models / f".{name}.lock"):
        shutil.rmtree(begun, ignore_errors=True)
        begun.mkdir()
        try:
            licence = fill(begun)
            check_model_folder(begun)
            note = write_provenance(begun, str(source), commit, licence)
            publish_folder(begun, models / name)
        finally:
            shutil.rmtree(begun, ignore_errors=True)
    (models / f".{name}.lock").unlink(missing_ok=True)
    return note


def copy_files(source: Path, target: Path, names: Collection[str]) -> None:
    """Copy the named files, links followed."""
    for name in names:
        shutil.copyfile(source / name, target / name)
