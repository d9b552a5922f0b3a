"""Rows as a served model gets them: checked before anything is computed, each complaint one line. Knows no MLflow.

MLflow drops, with a warning in a log that nobody reads, every column and every parameter that a model's signature does
not name: `temprature: 0.7` would be answered at temperature 0. What was really given stands in the frame of
`PyFuncModel.predict`, which called us, and is read there.
"""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhf_core.errors import DataError


def text_rows(columns: Mapping[str, Iterable[Any]], may_be_empty: Sequence[str] = ()) -> list[dict[str, str]]:
    """Rows of a table given column by column.

    MLflow makes one row of `{"prompt": [...], ...}`, with all texts in a cell each: that is the table again.

    Args:
        may_be_empty: columns in which an empty text is a value like any other.

    Raises:
        DataError: a value is not text, or is empty; it names the row (from 0) and the column. Or columns
            differ in length.
    """
    table = {name: list(values) for name, values in columns.items()}
    if all(len(values) == 1 and isinstance(values[0], list) for values in table.values()):
        table = {name: values[0] for name, values in table.items()}
    if len({len(values) for values in table.values()}) > 1:
        lengths = ", ".join(f"{name} has {len(values)}" for name, values in table.items())
        raise DataError(f"columns of different length: {lengths}. Fix: one value a row in each")
    rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    for number, row in enumerate(rows):
        for name, value in row.items():
            if not isinstance(value, str) or not (value.strip() or name in may_be_empty):
                raise DataError(f"row {number}: {name} is {_shown(value)}. Fix: give text")
    return rows


def refuse_unknown(columns: Sequence[str], params: Mapping[str, Any]) -> None:
    """Hold what the caller gave to MLflow against what the model knows.

    Args:
        columns: that the model reads.
        params: that it takes, each with its default.

    Raises:
        DataError: there is another one.
    """
    data, given = _given()
    known = f"columns are {', '.join(columns)}; parameters are {', '.join(params) or 'none'}"
    for name in _names(data):
        if name not in columns:
            where = " (it is a parameter: give it in `params`)" if name in params else ""
            raise DataError(f"unknown column {name!r}{where}. Fix: {known}")
    for name in given or {}:
        if name not in params:
            raise DataError(f"unknown parameter {name!r}. Fix: {known}")


def within(params: Mapping[str, Any], name: str, lowest: float, highest: float | None = None) -> Any:
    """A parameter's value.

    Raises:
        DataError: it is out of bounds.
    """
    value = params[name]
    if value is None or not math.isfinite(value):
        raise DataError(f"parameter {name} is {value}. Fix: a finite number, or leave it out")
    if not lowest <= value <= (value if highest is None else highest):
        bounds = f"at least {lowest:g}" if highest is None else f"from {lowest:g} to {highest:g}"
        raise DataError(f"parameter {name} is {value}. Fix: {bounds}")
    return value


def _given() -> tuple[Any, Mapping[str, Any] | None]:
    """Data and parameters as `PyFuncModel.predict` was called with; None where it is not among the callers."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "predict" and type(frame.f_locals.get("self")).__name__ == "PyFuncModel":
            return frame.f_locals.get("data"), frame.f_locals.get("params")
    return None, None


def _names(data: Any) -> list[str]:
    if data is None:
        return []
    if isinstance(data, list):
        return list(dict.fromkeys(str(name) for row in data if isinstance(row, Mapping) for name in row))
    if isinstance(data, Mapping):
        return [str(name) for name in data]
    return [str(name) for name in getattr(data, "columns", ())]


def _shown(value: Any) -> str:
    return "empty" if isinstance(value, str) else f"{value!r}, no text"
