"""What is made from the schema of `params.yaml`: `python -m tasks.reference` writes the reference page
`docs/parameters.md` and the JSON Schema `params.schema.json`, which editors read.
"""

import json
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Union

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rlhf_core.config import Params
from rlhf_core.state.atomic import write_text

PAGE = Path("docs/parameters.md")
SCHEMA = Path("params.schema.json")
DIALECT = "https://json-schema.org/draft/2020-12/schema"

HEADER = """# Parameters

Every key of `params.yaml`, made from the schema in `rlhf_core/config` by `python -m tasks.reference`
(a test fails when this page is stale). A key that is left out has its default. Unknown keys, wrong types and
values out of bounds are refused before anything runs, with file, line and cure, exit code 2.

A profile (`profiles/*.yaml`) holds only the keys in which it differs. `rlhf run --profile NAME --set section.key=value`
lays a profile and then single values over `params.yaml`, in a worktree of the run's own.

`params.schema.json` is the same as JSON Schema. The first line of `params.yaml` and of each profile names it, so that
editors with a YAML language server complete keys, show this page's texts, and mark what will be refused; in a file of
your own write `# yaml-language-server: $schema=../params.schema.json`. `rlhf schema` prints it.
"""


def parameter_reference() -> str:
    """Return the reference page as Markdown, one table a section."""
    parts = [HEADER]
    _section(Params, "", parts)
    return "\n".join([*parts, *choices()])


def json_schema() -> str:
    """Return the JSON Schema of `params.yaml` as text; a profile, which holds some of the keys, fits it too."""
    return json.dumps({"$schema": DIALECT, **Params.model_json_schema(by_alias=True)}, indent=2) + "\n"


def choices() -> list[str]:
    """Return what the registries say of the names that some keys take, one table a registry, as lines of Markdown."""
    # Not above: who asks for the JSON Schema alone does not wait for torch.
    from rlhf_core.config.ppo import ADVANTAGE_ROWS
    from rlhf_core.config.preference import LOSS_ROWS
    from rlhf_core.config.reward import REWARD_LOSS_ROWS
    from rlhf_core.data.reading.readers import READERS
    from rlhf_core.evaluation.judge_registry import JUDGES, PairwiseJudge
    from rlhf_core.objectives.preference import PAIR_LOSSES
    from tasks.stages.label.sources import SOURCES

    kinds = {name: "two responses" if isinstance(one, PairwiseJudge) else "a response" for name, one in JUDGES.items()}
    judges = [(kinds[name], bool(one.row.simulated), one.row.docs) for name, one in JUDGES.items()]
    sources = [(bool(one.row.simulated), _names(one.reads), one.row.docs) for one in SOURCES.values()]
    pairs = [(PAIR_LOSSES[name].needs_reference, _names(row.options), row.docs) for name, row in LOSS_ROWS.items()]
    rewards = [(row.has_variance, row.of_rankings, row.docs) for row in REWARD_LOSS_ROWS.values()]
    methods = [(row.compares, row.docs) for row in ADVANTAGE_ROWS.values()]
    formats = [(reader.gzipped, reader.docs) for reader in READERS.values()]
    return [
        "# What the names stand for",
        "",
        "Made from the registries that the program itself reads; [how to add one](../CONTRIBUTING.md).",
        "",
        *_table("Judges: `evaluate.judges`", ("is shown", "simulated", "who judges"), JUDGES, judges),
        *_table("Label sources: `label.source`", ("simulated", "reads of `data`", "whose votes"), SOURCES, sources),
        *_table("Losses on pairs: `align.dpo.loss`", ("reference", "options", "take it when"), LOSS_ROWS, pairs),
        *_table(
            "Reward losses: `reward.loss.name`", ("learns variances", "of rankings", "loss"), REWARD_LOSS_ROWS, rewards
        ),
        *_table("Advantages: `align.ppo.advantages.method`", ("within", "held against"), ADVANTAGE_ROWS, methods),
        *_table("Data files: `data`", ("also with `.gz`", "what it holds"), READERS, formats),
    ]


def _table(title: str, columns: Sequence[str], names: Iterable[str], rows: Iterable[Sequence[str | bool]]) -> list[str]:
    cells = zip(names, rows, strict=True)
    lines = [f"| `{name}` | {' | '.join(_cell(cell) for cell in row)} |" for name, row in cells]
    head = ("name", *columns)
    return [f"## {title}", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *lines, ""]


def _cell(value: str | bool) -> str:
    return value if isinstance(value, str) else "yes" if value else "no"


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "–"


def _section(model: type[BaseModel], prefix: str, parts: list[str]) -> None:
    rows, nested = [], []
    for name, field in model.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        section = _nested(field.annotation)
        if section is not None:
            nested.append((section, key))
        if section is not field.annotation:
            rows.append(f"| `{key}` | {_type(field)} | `{_default(field)}` | {field.description or ''} |")
    if rows:
        title = prefix.rstrip(".") or "Top level"
        doc = (model.__doc__ or "").strip().split("\n")[0] if prefix else "Beside the sections below."
        parts += [f"## {title}", "", doc, "", "| key | takes | default | meaning |", "|---|---|---|---|", *rows, ""]
    for section, key in nested:
        _section(section, f"{key}.", parts)


def _nested(annotation: Any) -> type[BaseModel] | None:
    """The section a field holds, also where it may hold null instead."""
    for kind in typing.get_args(annotation) or (annotation,):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _default(field: FieldInfo) -> str:
    value = field.default
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _type(field: FieldInfo) -> str:
    text, bounds = _describe(field.annotation)
    bounds += [_bound(item) for item in field.metadata if _bound(item)]
    return " ".join([text, *dict.fromkeys(bounds)])


def _describe(annotation: Any) -> tuple[str, list[str]]:
    """Name a type in words, and collect the bounds written into it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        text, bounds = _describe(arguments[0])
        return text, bounds + [_bound(item) for item in arguments[1:] if _bound(item)]
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments), []
    if origin in (Union, types.UnionType):
        described = [_describe(argument) for argument in arguments]
        return " or ".join(text for text, _ in described), [bound for _, bounds in described for bound in bounds]
    if origin is tuple:
        text, bounds = _describe(arguments[0])
        return " ".join([f"list of {text}", *bounds]), []
    if origin is dict:
        keys, values = (_describe(argument) for argument in arguments)
        return " ".join([f"map of {keys[0]} to {values[0]}", *values[1]]), []
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a section", []
    names = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null"}
    return names[annotation], []


def _bound(item: Any) -> str:
    match item:
        case annotated_types.Gt(gt=value):
            return f"> {value:g}"
        case annotated_types.Ge(ge=value):
            return f"≥ {value:g}"
        case annotated_types.Lt(lt=value):
            return f"< {value:g}"
        case annotated_types.Le(le=value):
            return f"≤ {value:g}"
        case annotated_types.Interval():
            return " ".join(_bound(part) for part in item)
        case annotated_types.MinLen():
            return "not empty"
    return ""


if __name__ == "__main__":
    write_text(PAGE, parameter_reference())
    write_text(SCHEMA, json_schema())
