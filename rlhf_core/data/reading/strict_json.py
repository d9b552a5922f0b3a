"""JSON with nothing to guess: what Python's parser lets pass silently is reported as a fault of the row."""

import json
import math
from typing import Any

from rlhf_core.text.normal import REFUSED_CHARACTERS

MAX_DEPTH = 64


class Ambiguous(dict[str, Any]):
    """An object in which a key stands twice, as it would be read; `twice` is that key."""

    twice: str


class StrictDecoder:
    """Decodes JSON values one by one; what is wrong in a value that can be decoded, `content_fault` says."""

    def __init__(self) -> None:
        self._decoder = json.JSONDecoder(object_pairs_hook=_object)

    def decode(self, text: str, start: int = 0) -> tuple[Any, int]:
        """Decode the value that begins at `start`: the value, and the position after it.

        Raises:
            ValueError: there is no complete JSON value.
        """
        try:
            return self._decoder.raw_decode(text, start)
        except RecursionError:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None

    def decode_line(self, text: str) -> tuple[Any, str | None]:
        """Decode a text that must be one value and nothing else: the value, and why there is none or None."""
        stripped = text.strip(" \t\r\n")
        try:
            value, end = self.decode(stripped)
        except json.JSONDecodeError as error:
            return None, f"not JSON: {error.msg} at character {error.pos + 1}"
        except ValueError as error:
            return None, str(error)
        if end != len(stripped):
            return None, f"not JSON: more text after the value, at character {end + 1}"
        return value, None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    names = [name for name, _ in pairs]
    ambiguous = Ambiguous(value)
    ambiguous.twice = next(name for name in names if names.count(name) > 1)
    return ambiguous


def row_faults(value: Any) -> tuple[str | None, dict[str, str]]:
    """What is wrong with a row as a whole, or None, and what is wrong in single columns of it."""
    if not isinstance(value, dict):
        return content_fault(value), {}
    if isinstance(value, Ambiguous):
        return _said_twice(value), {}
    whole = next((fault for name in value if (fault := content_fault(name))), None)
    columns = {name: fault for name, item in value.items() if (fault := content_fault(item, 1))}
    return whole, columns


def content_fault(value: Any, depth: int = 0) -> str | None:
    """The first refused character, non-finite number, key that stands twice or too deep nesting in a value, or None."""
    if isinstance(value, str):
        found = REFUSED_CHARACTERS.search(value)
        return _character_fault(found.group()) if found else None
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not a finite number"
    if not isinstance(value, dict | list):
        return None
    if isinstance(value, Ambiguous):
        return _said_twice(value)
    if depth == MAX_DEPTH:
        return f"nested deeper than {MAX_DEPTH} levels"
    inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    return next((fault for item in inner if (fault := content_fault(item, depth + 1))), None)


def _said_twice(value: Ambiguous) -> str:
    return f"key {value.twice!r} stands twice in one object"


def _character_fault(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # what the surrogateescape handler makes of a byte that is not UTF-8
        return f"byte 0x{code - 0xDC00:02x} is not valid UTF-8"
    if 0xD800 <= code <= 0xDFFF:
        return f"half of a surrogate pair, U+{code:04X}"
    return f"control character U+{code:04X}"
