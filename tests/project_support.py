"""Changing the YAML files of a project that a test made."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML


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
