"""`dvc.lock` in one piece. DVC writes it in place, and a kill meanwhile leaves a part that DVC refuses ever after.

Where the pipeline starts DVC it is `python -m tasks.frame.lock_file …`, which is `dvc …` but for writing its files
whole. Under a `dvc` that a person starts each stage keeps a copy of what DVC had recorded when it began, and whatever
asks DVC here next takes that copy up again.
"""

import io
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from rlhf_core.errors import ConfigError
from rlhf_core.state.atomic import write_text
from tasks import paths
from tasks.paths import LOCK

KEPT = paths.STATE / LOCK.name
ASIDE = paths.STATE / f"{LOCK.name}.cut"
OWN = Path("tasks/frame/lock_file.py")
HEAD = "schema:"  # how DVC begins the file
WRITING_SECONDS = 2.0  # that DVC, at work in another terminal, may take to write the file
POLL_SECONDS = 0.1


def write_whole_files() -> None:
    """Have DVC, in this process, write what it records under another name first, and then put it in its place."""
    from dvc.utils.serialize import _common, _yaml

    in_place = _common._dump_data

    def whole(path: str, data: Any, dumper: Callable[[Any, IO[str]], Any], fs: Any = None, **dumper_args: Any) -> None:
        if fs is not None and fs.protocol != "local":
            in_place(path, data, dumper, fs=fs, **dumper_args)
            return
        text = io.StringIO()
        dumper(data, text, **dumper_args)
        target = Path(path).resolve()  # what a link names, not the link
        mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
        write_text(target, text.getvalue())
        if mode is not None:
            target.chmod(mode)

    _common._dump_data = _yaml._dump_data = whole


def dvc_command(root: Path) -> list[str]:
    """How to start DVC in a checkout: writing whole files, unless the code that lies there is of before this module."""
    older = (root / "tasks").is_dir() and not (root / OWN).is_file()
    return [sys.executable, "-m", "dvc" if older else "tasks.frame.lock_file"]


def keep(root: Path) -> None:
    """Copy `dvc.lock` as it now is to where `mended` finds it; a file that is visibly no whole one is not copied."""
    try:
        text = (root / LOCK).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return
    if text.startswith(HEAD) and text.endswith("\n"):
        write_text(root / KEPT, text)


def mended(root: Path) -> str:
    """Put a copy in the place of a `dvc.lock` that DVC cannot read; what stood there is kept as `.rlhf/dvc.lock.cut`.

    The copy is the one that the last stage kept, or else the committed one. Where there is neither the file goes, and
    every stage counts as never run. A copy that is older than what was made since costs time alone: DVC compares it
    with the files that are there.

    Returns:
        What was done, in a line; empty where the file is whole, or there is none.

    Raises:
        ConfigError: it holds git's conflict markers.
    """
    path = root / LOCK
    deadline = time.monotonic() + WRITING_SECONDS
    while True:
        if not path.exists() or readable(text := path.read_text(encoding="utf-8", errors="replace")):
            return ""
        if "\n<<<<<<< " in f"\n{text}":
            raise ConfigError(f"{path}: holds a merge conflict. Fix: git checkout --ours dvc.lock, or --theirs")
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
    whole, source = _copy(root)
    (root / ASIDE).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, root / ASIDE)
    if whole:
        write_text(path, whole)
    else:
        path.unlink()
    return f"{path}: cut off, probably by a kill; {source}. What stood there is in {ASIDE}"


def _copy(root: Path) -> tuple[str, str]:
    """The text that takes the place of a cut file, empty for none; and where it comes from, in words."""
    try:
        text = (root / KEPT).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        text = ""
    if text and readable(text):
        return text, "it is again what it was when the last stage began"
    committed = ("git", "show", f"HEAD:./{LOCK}")
    done = subprocess.run(committed, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode == 0 and readable(done.stdout):
        return done.stdout, "it is again the committed one"
    return "", "there is no copy, so every stage runs anew"


def readable(text: str) -> bool:
    """Whether DVC takes this for a lock file."""
    from dvc.exceptions import DvcException
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from dvc.utils.serialize import parse_yaml
    from dvc.utils.strictyaml import validate

    try:
        validate(parse_yaml(text, LOCK.name), COMPILED_LOCKFILE_SCHEMA)
    except DvcException:
        return False
    return True


def first_line(error: BaseException) -> str:
    """First line of what DVC says, or the error's name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def main(arguments: list[str]) -> int:
    """Run `dvc` with these arguments; returns its exit code."""
    write_whole_files()
    from dvc.cli import main as dvc

    sys.argv = ["dvc", *arguments]
    return int(dvc(arguments))


if __name__ == "__main__":
    from tasks.frame.leave import leave

    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    leave(lambda: main(sys.argv[1:]))
