"""Statements of another project's source, to be executed where they cannot be called: the middle of a long method."""

import ast
from typing import Any


def statements(tree: ast.Module, first: str, last: str) -> ast.Module:
    """The statements of one block, from the first that assigns `first` to the last that assigns `last`.

    Raises LookupError when no block does, as in another version of that source.
    """
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        named = [
            {target.id for target in getattr(each, "targets", []) if isinstance(target, ast.Name)} for each in body
        ]
        starts = [i for i, names in enumerate(named) if first in names]
        ends = [i for i, names in enumerate(named) if last in names]
        if starts and ends and starts[0] < ends[-1]:
            return ast.Module(body=body[starts[0] : ends[-1] + 1], type_ignores=[])
    raise LookupError(f"no block assigns {first} and then {last}: another version of this source?")


def execute(block: ast.Module, scope: dict[str, Any], name: str) -> None:
    """Run the statements in `scope`; `name` stands in the traceback of what fails in them."""
    exec(compile(ast.fix_missing_locations(block), name, "exec"), scope)
