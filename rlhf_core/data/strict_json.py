"""JSON with nothing to guess: what Python's parser lets pass silently is reported as a fault of the row."""

import json
import math
from typing import Any

from rlhf_core.data.normal import REFUSED_CHARACTERS

MAX_DEPTH = 64


class StrictDecoder:
    """Decodes JSON values one by one and collects what is wrong with each.

    Faults are collected rather than raised, so that a value in the middle of an array can be refused alone.
    """

    def __init__(self) -> None:
        self._faults: list[str] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_float=self._number
        )

    def decode(self, text: str, start: int = 0) -> tuple[Any, int, str | None]:
        """Decode the value that begins at `start`: the value, the position after it, and its first fault or None.

        Raises:
            ValueError: there is no complete JSON value.
        """
        self._faults = []
        try:
            value, end = self._decoder.raw_decode(text, start)
        except RecursionError:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
        return value, end, (self._faults[0] if self._faults else content_fault(value))

    def decode_line(self, text: str) -> tuple[Any, str | None]:
        """Decode a text that must be one value and nothing else: the value and its first fault or None."""
        stripped = text.strip(" \t\r\n")
        try:
            value, end, fault = self.decode(stripped)
        except json.JSONDecodeError as error:
            return None, f"not JSON: {error.msg} at character {error.pos + 1}"
        except ValueError as error:
            return None, str(error)
        if end != len(stripped):
            return None, f"not JSON: more text after the value, at character {end + 1}"
        return value, fault

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            self._faults.append(f"key {twice!r} stands twice in one object")
        return value

    def _constant(self, name: str) -> float:
        self._faults.append(f"{name} is not a JSON number")
        return math.nan

    def _number(self, text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            self._faults.append(f"{text[:24]} is not a finite number")
        return value


def content_fault(value: Any, depth: int = 0) -> str | None:
    """The first refused character, non-finite number or too deep nesting inside a decoded value, or None."""
    if isinstance(value, str):
        found = REFUSED_CHARACTERS.search(value)
        return _character_fault(found.group()) if found else None
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not a finite number"
    if not isinstance(value, dict | list):
        return None
    if depth == MAX_DEPTH:
        return f"nested deeper than {MAX_DEPTH} levels"
    inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    return next((fault for item in inner if (fault := content_fault(item, depth + 1))), None)


def _character_fault(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # what the surrogateescape handler makes of a byte that is not UTF-8
        return f"byte 0x{code - 0xDC00:02x} is not valid UTF-8"
    if 0xD800 <= code <= 0xDFFF:
        return f"half of a surrogate pair, U+{code:04X}"
    return f"control character U+{code:04X}"
