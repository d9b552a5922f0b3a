"""Model folders that a stage reads, and the one folder that DVC watches for them.

A dependency in `dvc.yaml` takes one path from `params.yaml` and no list, so a stage with several model folders names
one folder that holds them all. Watching all of `models/` would hash, and count as a change, what no run reads.
"""

import posixpath
from collections.abc import Sequence

PLACEHOLDER = "models/none"
"""The empty folder that git carries: a DVC dependency cannot be absent."""
HOME = "models"


def check_folder(folder: str) -> None:
    """Refuse a folder that does not lie under `models/`.

    Raises:
        ValueError: it does not.
    """
    parts = folder.split("/")
    if parts[0] != HOME or len(parts) < 2 or set(parts) & {"..", ".", ""}:
        raise ValueError(f"folder {folder!r} must lie under models/: copy it there")


def check_watched(watched: str, folders: Sequence[str], section: str) -> None:
    """Refuse folders that do not lie at or under the one that is watched: they could change unseen.

    Args:
        watched: `models_folder` of the section.
        folders: that the stage reads.
        section: of `params.yaml`, for messages.

    Raises:
        ValueError: one does not, or `watched` is neither `models` nor under it.
    """
    if watched != HOME:
        check_folder(watched)
    outside = [folder for folder in folders if not holds(watched, folder)]
    if outside:
        common = common_folder(folders)
        all_of_it = ", which hashes all that lies there, or first move them into one folder" if common == HOME else ""
        raise ValueError(
            f"models_folder {watched!r}, which DVC watches, does not hold {', '.join(map(repr, outside))}: "
            f"set {section}.models_folder to {common}{all_of_it}"
        )


def holds(watched: str, folder: str) -> bool:
    """Whether a folder is the watched one or lies under it."""
    return folder == watched or folder.startswith(f"{watched}/")


def common_folder(folders: Sequence[str]) -> str:
    """The narrowest folder that holds them all; the placeholder where there are none."""
    return posixpath.commonpath(folders) if folders else PLACEHOLDER
