"""What a command means by VERSION: a registered version, or a folder with a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flows.root import find_root
from rlhf_core.errors import ConfigError
from rlhf_core.state.atomic import temporary_folder
from tasks import paths
from tasks.catalogue import MODEL_NAMES


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedModel:
    """A model folder and what it is called.

    Attributes:
        name: `rlhf-policy/3`, or the folder as it was given.
        aliases: other names: `rlhf-policy@champion`.
        folder: there while the `with` that opened it lasts.
    """

    name: str
    aliases: tuple[str, ...]
    folder: Path


@contextmanager
def model_folder(reference: str) -> Iterator[NamedModel]:
    """The folder of a registered version, brought here for as long as it is used, or a folder that is there.

    Raises:
        ConfigError: it is neither.
        EnvironmentProblem: the registry or the version's files are away.
    """
    if reference.replace("@", "/").partition("/")[0] not in MODEL_NAMES:
        if (path := Path(reference)).is_dir():
            yield NamedModel(name=str(path), aliases=(), folder=path)
            return
        raise ConfigError(
            f"{reference}: no folder, and no registered version. Fix: a folder with a model, or name@alias or "
            f"name/number as rlhf models list shows them; names are {', '.join(MODEL_NAMES)}"
        )
    from tasks.tracking import download_version, resolve_version

    home = paths.home(find_root(Path.cwd()))
    version = resolve_version(home, reference)
    aliases = tuple(f"{version.name}@{alias}" for alias in version.aliases)
    with temporary_folder(home / paths.STATE / "staging", "serve") as scratch:
        folder = download_version(home, version, "artifacts/model", scratch)
        yield NamedModel(name=str(version), aliases=tuple(dict.fromkeys((reference, *aliases))), folder=folder)
