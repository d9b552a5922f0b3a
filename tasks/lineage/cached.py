"""Outputs of stages as DVC keeps them, found by what a `dvc.lock` says of them."""

import json
from collections.abc import Iterator
from pathlib import Path

from ruamel.yaml import YAML

FOLDER = ".dir"
"""Ends the hash of a folder, whose file in the cache lists the folder's files with their hashes."""


def cached(home: Path, lock: str, stage: str, path: Path) -> Iterator[Path]:
    """Where the cache of a checkout would hold an output of a stage; whether it does is not looked at.

    Args:
        home: the main checkout.
        lock: text of the `dvc.lock`.
        stage: that made the output.
        path: of one file, as it lay in the checkout.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    outs = (YAML(typ="safe").load(lock) or {}).get("stages", {}).get(stage, {}).get("outs", [])
    try:
        with Repo(str(home)) as repo:
            place = repo.cache.local.oid_to_path
    except DvcException:  # a checkout that DVC does not know
        return
    for out in outs:
        md5 = str(out.get("md5", ""))
        if md5 and out["path"] == path.as_posix():
            yield Path(place(md5))
        elif md5.endswith(FOLDER) and path.is_relative_to(out["path"]) and Path(place(md5)).is_file():
            inside = path.relative_to(out["path"]).as_posix()
            listed = json.loads(Path(place(md5)).read_text(encoding="utf-8"))
            yield from (Path(place(entry["md5"])) for entry in listed if entry["relpath"] == inside)
