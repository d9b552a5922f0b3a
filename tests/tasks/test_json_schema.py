"""`params.schema.json`, held against a validator that is not ours."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "params.schema.json").read_text())
FILES = [ROOT / "params.yaml", *sorted((ROOT / "profiles").glob("*.yaml"))]


def read(path: Path) -> Any:
    return YAML(typ="safe").load(path.read_text())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_of_settings_names_the_schema_and_fits_it(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    named = first.removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / named).resolve() == ROOT / "params.schema.json"
    jsonschema.Draft202012Validator(SCHEMA).validate(read(path))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("sft", "learning_rat", 0.1),
        ("sft", "learning_rate", "0.1"),
        ("sft", "max_steps", -1),
        ("model", "family", "gpt"),
    ],
)
def test_an_editor_marks_what_would_be_refused(section: str, key: str, value: Any) -> None:
    document = read(ROOT / "params.yaml")
    document[section][key] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMA).validate(document)


def test_every_key_is_described() -> None:
    sections = {"": SCHEMA, **SCHEMA["$defs"]}
    bare = [
        f"{name}.{key}"
        for name, section in sections.items()
        for key, field in section.get("properties", {}).items()
        if not field.get("description") and not _section_described(field)
    ]
    assert bare == []


def _section_described(field: dict[str, Any]) -> bool:
    """Whether a key holds a section, which says itself what it is."""
    target = field.get("$ref", "").rpartition("/")[2]
    return bool(SCHEMA["$defs"].get(target, {}).get("description"))
