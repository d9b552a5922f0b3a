"""Which prompts are held out: by group (dialogue) and by a hash that knows nothing of the other rows."""

import hashlib
from collections.abc import Iterable, Set
from typing import Literal

from rlhf_core.data.identity import prompt_group

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


def split_of(prompt: str, heldout_groups: Set[str], share: float) -> Split:
    """Return `heldout` for a prompt whose group is named in `heldout_groups` or falls into the hashed share."""
    group = prompt_group(prompt)
    return "heldout" if group in heldout_groups or is_heldout(group, share) else "train"
