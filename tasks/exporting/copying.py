"""An exported folder in another place of this machine, such as a shared disk: whole or not there."""

import shutil
from pathlib import Path

from rlhf_core.errors import ConfigError
from rlhf_core.state.atomic import publish_folder, temporary_folder, tree_digest


def push_to_folder(folder: Path, target: Path) -> bool:
    """Copy a folder that was verified; False where the target is it already.

    Raises:
        ConfigError: the target is something else.
    """
    if target.exists():
        if target.is_dir() and tree_digest(target) == tree_digest(folder):
            return False
        raise ConfigError(f"{target}: is there already and is something else. Fix: another name, or remove it")
    with temporary_folder(target.absolute().parent, f"push-{target.name}") as scratch:
        shutil.copytree(folder, scratch / target.name)
        publish_folder(scratch / target.name, target)
    return True
