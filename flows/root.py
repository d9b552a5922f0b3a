"""Where a command works: the checkout that somebody stands in. Imports next to nothing, for answers at once."""

from pathlib import Path

from rlhf_core.errors import ConfigError
from tasks import paths


def find_root(start: Path) -> Path:
    """The checkout or worktree that `start` lies in.

    Raises:
        ConfigError: it lies in none.
    """
    for folder in (start, *start.parents):
        if (folder / paths.DVC_FILE).is_file() and (folder / paths.PARAMS).is_file():
            return folder
    raise ConfigError(
        f"{start}: no {paths.DVC_FILE} and {paths.PARAMS} here or above. Fix: cd into the project's folder"
    )
