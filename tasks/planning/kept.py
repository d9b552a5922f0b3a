"""What counting and measuring found, kept under `.rlhf/plan` of the main checkout by a digest of all it depends on."""

import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from rlhf_core.state.atomic import digest_of, tree_digest, write_json
from tasks import paths

FOLDER = paths.STATE / "plan"
CODE = ("engine", "models", "objectives", "planning", "rollout", "trainers")
"""What of `rlhf_core` decides how long a step takes."""
Found = TypeVar("Found", bound=BaseModel)


def kept(home: Path, kind: type[Found], name: str, find: Callable[[], Found] | None) -> Found | None:
    """What was found before under this name; else what `find` finds now, which is kept; None where it is not asked."""
    path = home / FOLDER / f"{kind.__name__.lower()}-{name}.json"
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        pass
    if find is None:
        return None
    found = find()
    write_json(path, found.model_dump(mode="json"))
    return found


def machine_digest(root: Path) -> str:
    """Digest of the processor, the libraries and the code that decide how long a step takes."""
    code = {part: tree_digest(root / "rlhf_core" / part) for part in CODE}
    plain = {part: {name: one for name, one in files.items() if name.endswith(".py")} for part, files in code.items()}
    return digest_of({"processor": processor(), "torch": version("torch"), "code": plain})


def processor() -> str:
    """Name of the processor, as the kernel has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def data_digest(root: Path, files: list[Path]) -> str:
    """Digest of the sizes and times of files, and of all files in folders: what has changed has another."""
    found = {}
    for path in files:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                state = file.stat()
                found[str(file.relative_to(root) if file.is_relative_to(root) else file)] = (
                    state.st_size,
                    state.st_mtime_ns,
                )
    return digest_of(found)
