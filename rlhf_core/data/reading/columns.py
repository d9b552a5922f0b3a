"""Which column of a file is read as which field of a record kind, and what to make of columns that no field has."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rlhf_core.data.reading.kinds import SPECS, Kind

_TYPO_LENGTH = 5
"""In shorter names one letter makes another word: `uid` and `idx` are no misspelt `id`, `tasks` is no `task`."""

_WEIGHTS = frozenset(
    {"weight", "weights", "sample_weight", "row_weight", "example_weight", "importance_weight", "loss_weight"}
)
_SOFT_LABELS = frozenset(
    {
        "label", "labels", "soft_label", "label_prob", "chosen_prob", "chosen_probability", "prob_chosen", "p_chosen",
        "preference_prob", "preference_probability", "probability", "margin", "soft_labels", "prob", "probs",
        "confidence", "preference_strength",
    }
)  # fmt: skip
_TIES = frozenset({"tie", "is_tie", "tied"})
_NO_TIE = (None, "", 0, False, "0", "0.0", "false", "False")
_NEUTRAL = (None, "", 1, True, "1", "1.0", "true", "True", "chosen")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How rows with certain columns are read.

    Attributes:
        sources: field -> the column that it is read from.
        unknown: columns that are left out.
        hints: for a required field that is absent, what stands there instead.
        problem: a column that is nearly an optional field which is absent.
    """

    sources: Mapping[str, str]
    unknown: frozenset[str]
    hints: Mapping[str, str]
    problem: str | None


@lru_cache
def known_columns(kind: Kind) -> frozenset[str]:
    """Every column that rows of a kind may be read from."""
    names = {name for field, spec in SPECS[kind].items() for name in (field, *spec.aliases)}
    return frozenset(names | {"messages", "tools"})


@lru_cache(maxsize=1024)
def plan(kind: Kind, names: frozenset[str]) -> Plan:
    """How rows of a kind with these columns are read; the same for all rows that have the same ones."""
    sources: dict[str, str] = {}
    for name, spec in SPECS[kind].items():
        found = next((known for known in (name, *spec.aliases) if known in names), None)
        if found is not None:
            sources[name] = found
    unknown = names - set(sources.values())
    hints: dict[str, str] = {}
    problem = None
    for name, spec in SPECS[kind].items():
        if name in sources:
            continue
        if spec.required:
            near = difflib.get_close_matches(name, sorted(unknown), n=1)
            there = ", ".join(sorted(names)) or "nothing"
            have = f"the nearest name is {near[0]!r}" if near else f"the row has {there}"
            hints[name] = f"missing ({have})"
        else:
            slips = (other for other in sorted(unknown) if is_typo(other, name))
            problem = next((f"unknown field {other!r}; the nearest known one is {name!r}" for other in slips), problem)
    return Plan(sources=sources, unknown=unknown, hints=hints, problem=problem)


def is_typo(given: str, known: str) -> bool:
    """Whether a name is a known one in other case, or with one letter wrong, missing or too many, or two turned; a
    plural is not."""
    given = given.casefold().strip()
    if (given, known) == ("criteria", "criterion"):
        return True
    if len(known) >= _TYPO_LENGTH and given == known:
        return True
    if len(known) < _TYPO_LENGTH or given == f"{known}s":
        return False
    short, long = sorted((given, known), key=len)
    places = range(len(long))
    if len(short) < len(long):
        return any(long[:place] + long[place + 1 :] == short for place in places)
    wrong = [place for place in places if given[place] != known[place]]
    turned = len(wrong) == 2 and wrong[1] == wrong[0] + 1 and given[wrong[0]] + given[wrong[1]] == (
        known[wrong[1]] + known[wrong[0]]
    )  # fmt: skip
    return len(wrong) == 1 or turned


def weight_problem(kind: Kind, value: Mapping[str, Any], unknown: frozenset[str]) -> str | None:
    """Why a row cannot be read that should count for more or less than others, or holds for likely and not for certain.

    No stage reads such columns, and rows read without them would say something else than was meant. One that says what
    holds without it (weight 1, label 1) does no harm.
    """
    for name in sorted(unknown):
        plain = name.strip().lower().replace("-", "_").replace(" ", "_")
        shown = str(value[name])[:40]
        if kind == "comparisons" and plain in _TIES and not (_is_nan(value[name]) or value[name] in _NO_TIE):
            return f"{name} is {shown}: a comparison has a chosen response. Leave the row out, or give ties as votes"
        if plain in _TIES or _is_neutral(value[name]):
            continue
        if plain in _WEIGHTS:
            return (
                f"{name} is {shown}: rows have no weights. Leave the column out, or repeat judgements: they are votes"
            )
        if kind == "comparisons" and plain in _SOFT_LABELS:
            return (
                f"{name} is {shown}: a comparison is for certain. Leave the column out, or say how sure people were by "
                "several rows, or how much better by `strength` (1 to 5)"
            )
        if kind == "demonstrations" and plain == "label":
            return f"{name} is {shown}: a demonstration is there to be imitated. Leave such rows out, or the column"
    return None


def _is_neutral(value: Any) -> bool:
    return _is_nan(value) or (isinstance(value, str | int | float | None) and value in _NEUTRAL)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
