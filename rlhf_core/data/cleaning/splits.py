"""Which prompts are held out: by group (dialogue) or a named column, and by a hash that knows nothing of other rows."""

import hashlib
from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import Literal

from rlhf_core.text.identity import prompt_group
from rlhf_core.text.normal import normal_form

Split = Literal["train", "heldout"]


def is_heldout(group: str, share: float) -> bool:
    """Whether a prompt group belongs to the held-out `share` (0 to 1) of all groups.

    The answer depends on the group alone, so new rows move no old one, and a larger share only adds groups.
    """
    return _place(group) < share * 2**64


def next_heldout(groups: Iterable[str]) -> str:
    """The group that is held out first as the share grows, for shares of a few groups that hold none out."""
    return min(groups, key=_place)


def _place(group: str) -> int:
    return int.from_bytes(hashlib.sha256(f"heldout {group}".encode()).digest()[:8])


def unit_of(prompt: str, column: str | None, value: str | None) -> str:
    """What a row is held out with: all rows that have its value in the column, or its dialogue where it has none."""
    return prompt_group(prompt) if column is None or value is None else f"{column} {normal_form(value)}"


def heldout_groups(rows: Iterable[tuple[str, str]], units: Set[str]) -> set[str]:
    """The prompt groups of which a row is held out with its unit.

    Args:
        rows: (prompt, unit).
        units: those that are held out.
    """
    return {prompt_group(prompt) for prompt, unit in rows if unit in units}


@dataclass(frozen=True, slots=True)
class SplitRule:
    """The side of a prompt, for every file and stage: it is held out where its group is.

    Attributes:
        groups: the held-out prompt groups.
    """

    groups: frozenset[str]

    def __call__(self, prompt: str) -> Split:
        """`heldout` or `train`, in whatever form the prompt is written."""
        return "heldout" if prompt_group(prompt) in self.groups else "train"
