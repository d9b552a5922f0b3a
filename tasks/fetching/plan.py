"""What a fetch would bring, known before anything is brought."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rlhf_core.model_folder import check_model_folder
from rlhf_core.state.atomic import digest_of, file_digest, tree_digest
from tasks.fetching.install import MIB, copy_files
from tasks.fetching.source import Source
from tasks.lineage.provenance import NOTE, UNKNOWN, read_provenance

FLOAT32_OVER_GGUF = 8
"""A number of four bits, the fewest in common use, becomes one of 32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchPlan:
    """A source that was looked at.

    Attributes:
        source: what is noted of it.
        commit: what identifies its content.
        licence: as far as it is known before.
        bytes: room that it takes, at most.
        left_out: files of the source that are not read.
        fill: writes the files into a folder that is there and empty, and returns their licence.
    """

    source: Source
    commit: str
    licence: str
    bytes: int
    left_out: tuple[str, ...]
    fill: Callable[[Path], str]

    def line(self) -> str:
        """For people, before anything is fetched: what, how much, under which licence, what is not read."""
        lost = f"; not read: {_some(self.left_out)}" if self.left_out else ""
        return f"{self.source}: {self.commit[:12]}, at most {self.bytes / MIB:,.1f} MiB, licence {self.licence}{lost}"


def plan_fetch(source: Source) -> FetchPlan:
    """Look at a hub's repository, a file or a folder.

    Raises:
        ConfigError, EnvironmentProblem: see `list_repository` and `check_model_folder`.
    """
    if source.kind == "hub":
        return _of_hub(source)
    return _of_file(source) if source.kind == "gguf" else folder_plan(source, Path(source.name))


def folder_plan(source: Source, folder: Path, commit: str = "") -> FetchPlan:
    """A model folder of this machine; `commit` is the digest of its files unless given."""
    check_model_folder(folder)
    digests = {name: digest for name, digest in tree_digest(folder).items() if name != NOTE}
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    note = read_provenance(folder)
    licence = note.licence if note else UNKNOWN

    def fill(target: Path) -> str:
        copy_files(folder, target, names)
        return licence

    return FetchPlan(
        source=source,
        commit=commit or digest_of(digests),
        licence=licence,
        bytes=sum((folder / name).stat().st_size for name in names),
        left_out=tuple(sorted(path.name for path in folder.iterdir() if path.is_dir())),
        fill=fill,
    )


def _of_hub(source: Source) -> FetchPlan:
    from tasks.fetching.hub import download, list_repository

    found = list_repository(source)

    def fill(target: Path) -> str:
        download(found, target)
        return found.licence

    return FetchPlan(
        source=source,
        commit=found.commit,
        licence=found.licence,
        bytes=2 * found.bytes,  # in the cache of huggingface_hub, and here
        left_out=found.left_out,
        fill=fill,
    )


def _of_file(source: Source) -> FetchPlan:
    from tasks.fetching.gguf import dequantise

    path = Path(source.name)
    return FetchPlan(
        source=source,
        commit=file_digest(path),
        licence=UNKNOWN,
        bytes=FLOAT32_OVER_GGUF * path.stat().st_size,
        left_out=(),
        fill=partial(dequantise, path),
    )


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
