"""Changing the YAML files of a project that a test made."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML


def processes_of(project: Path) -> list[str]:
    """Command lines of the living processes that work in a project's folder, or below it; a zombie lives no more."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                inside = Path(os.readlink(entry / "cwd")).is_relative_to(project)
                dead = (entry / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if inside and not dead:
                found.append(f"{entry.name} {command}")
    return found


@contextmanager
def edited_yaml(path: Path) -> Iterator[dict[str, Any]]:
    """The content of a YAML file, to be changed; it is written back at the end."""
    safe = YAML(typ="safe", pure=True)  # plain values only: no tag builds an object
    safe.default_flow_style = False
    content = safe.load(path)
    yield content
    safe.dump(content, path)


def change_sections(project: Path, **sections: dict[str, Any]) -> None:
    """Lay values over sections of a project's `params.yaml`."""
    with edited_yaml(project / "params.yaml") as params:
        for name, values in sections.items():
            params.setdefault(name, {}).update(values)
