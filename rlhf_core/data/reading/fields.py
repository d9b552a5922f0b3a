"""The types that fields of a record kind may have, and raw values read as them.

Reading decides nothing: a value of the wrong type becomes null, beside words for what stands there instead.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_core.data.reading.strict_json import StrictDecoder, content_fault
from rlhf_core.text.normal import visible

FieldType = Literal["prompt", "response", "responses", "ranking", "name", "integer", "number"]

RIGHT_TYPE = "right"


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldSpec:
    """A field of a record kind.

    A `response` loses white space at its ends, and so does each of `responses`. A `name` is what can be seen of it, and
    may be written as a whole number, also as 1.0, which is how data frames write ids beside missing ones.
    A `ranking` is a list of whole numbers. In a format that knows only text, lists are JSON in their cell.
    """

    type: FieldType
    required: bool = True
    default: Any = None
    aliases: tuple[str, ...] = ()


def typed(spec: FieldSpec, value: Any, *, textual: bool) -> tuple[Any, str]:
    """The value in the type of its field and `RIGHT_TYPE`, or null and what stands there instead.

    Args:
        textual: the format knows only text, so numbers and lists have yet to be read out of it.
    """
    if not spec.required and (is_missing(value) or (textual and value == "")):
        return spec.default, RIGHT_TYPE
    match spec.type:
        case "prompt" if isinstance(value, str):
            return value, RIGHT_TYPE
        case "response" if isinstance(value, str):
            return value.strip(), RIGHT_TYPE
        case "name" if isinstance(value, str):
            return visible(value), RIGHT_TYPE
        case "name" if isinstance(value, int) and not isinstance(value, bool):
            return str(value), RIGHT_TYPE
        case "name" if isinstance(value, float) and value.is_integer():
            return str(int(value)), RIGHT_TYPE
        case "integer" | "number":
            return _number(value, textual=textual, whole=spec.type == "integer")
        case "responses":
            return _items(value, _text, textual=textual)
        case "ranking":
            return _items(value, _whole, textual=textual)
    return None, type_name(value)


def is_missing(value: Any) -> bool:
    """Whether a value stands for none: null, and NaN, by which data frames say null."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def type_name(value: Any) -> str:
    """The JSON word for what a value is."""
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "text", list: "array", dict: "object"}
    return names.get(type(value), type(value).__name__)


def _items(value: Any, read: Callable[[Any], tuple[Any, str]], *, textual: bool) -> tuple[list[Any] | None, str]:
    """A list with every item read, or null and the first item that is none."""
    if textual and isinstance(value, str):
        value, fault = StrictDecoder().decode_line(value)
        if fault or content_fault(value):
            return None, "text that is no JSON array"
    if not isinstance(value, list):
        return None, type_name(value)
    items = []
    for place, raw in enumerate(value, start=1):
        item, found = read(raw)
        if found != RIGHT_TYPE:
            return None, f"array whose item {place} is {found}"
        items.append(item)
    return items, RIGHT_TYPE


def _text(value: Any) -> tuple[str | None, str]:
    return (value.strip(), RIGHT_TYPE) if isinstance(value, str) else (None, type_name(value))


def _whole(value: Any) -> tuple[Any, str]:
    return _number(value, textual=False, whole=True)


def _number(value: Any, *, textual: bool, whole: bool) -> tuple[Any, str]:
    if textual and isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None, "text"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None, type_name(value)
    try:
        number = float(value)
    except OverflowError:
        return None, "number out of range"
    if not math.isfinite(number):
        return None, "number that is not finite"
    if not whole:
        return number, RIGHT_TYPE
    if not number.is_integer() or abs(number) >= 2**53:
        return None, "number that is not whole"
    return int(number), RIGHT_TYPE
