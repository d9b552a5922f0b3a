"""Nested figures and parameters under the flat names that MLflow takes."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

UNTAKEN = re.compile(r"[^\w./: -]")  # characters that MLflow refuses in the name of a metric


def numbers(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """The figures of a metrics document under names that MLflow takes; nested keys are joined by a slash."""
    plain: dict[str, float | None] = {}
    for key, value in metrics.items():
        name = UNTAKEN.sub("-", key)
        if isinstance(value, Mapping):
            plain |= {f"{name}/{inner}": figure for inner, figure in numbers(value).items()}
        elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            plain[name] = value if value is None or math.isfinite(value) else None
    return plain


def dotted(params: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Parameters under dotted keys, as text."""
    for key, value in params.items():
        if isinstance(value, Mapping):
            yield from dotted(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value if isinstance(value, str) else json.dumps(value, default=str)
