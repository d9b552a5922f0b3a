"""Labelled pairs as preferences: which rows say something, and which rows say the opposite of each other."""

import hashlib
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_core.text.identity import prompt_identity
from rlhf_core.text.normal import normal_form

Content = tuple[str, bytes, bytes]
"""Identity of a prompt, and keys of the chosen and of the rejected response."""


def response_key(text: str) -> bytes:
    """Digest of a response in normal form: the same for responses that look the same."""
    return hashlib.sha256(normal_form(text).encode()).digest()[:16]


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference:
    """One response chosen over another, with how sure the annotators were.

    Attributes:
        group: identity of the prompt (`prompt_identity`), one for all its disguises.
        split: the side of the prompt, `train` or `heldout`.
        num_votes: votes behind the label.
        agreement: share of the votes that say the same as the label.
        margin: mean signed vote strength toward the label.
    """

    pair_id: str
    prompt_id: str
    prompt: str
    group: str
    task: str
    split: str
    chosen: str
    rejected: str
    num_votes: int
    agreement: float
    margin: float
    source: str

    @property
    def strength_first(self) -> tuple[float, float, int, str, str, str, str]:
        """Sort key: the surest label first, then an order that depends on content alone."""
        return -self.margin, -self.agreement, -self.num_votes, self.pair_id, self.prompt, self.chosen, self.rejected

    @property
    def length_difference(self) -> int:
        """Characters of the chosen response minus those of the rejected one."""
        return len(self.chosen) - len(self.rejected)

    @property
    def content(self) -> Content:
        """What two exact duplicates have in common."""
        return self.group, response_key(self.chosen), response_key(self.rejected)


def to_preference(row: Mapping[str, Any]) -> Preference | None:
    """Read a row of `pairs.parquet` as a preference; a tie prefers nothing and gives None."""
    if row["label"] == "tie":
        return None
    chosen, rejected = ("response_a", "response_b") if row["label"] == "a" else ("response_b", "response_a")
    names = ("pair_id", "prompt_id", "prompt", "task", "split", "num_votes", "agreement", "margin", "source")
    given = {name: row[name] for name in names}
    for name in ("prompt", "prompt_id", "task", "split", "source"):
        given[name] = sys.intern(given[name])  # many rows share each of them
    return Preference(
        group=sys.intern(prompt_identity(row["prompt"])), chosen=row[chosen], rejected=row[rejected], **given
    )


def without_equal(pairs: Iterable[Preference]) -> list[Preference]:
    """Leave out pairs whose responses differ in nothing but case, white space, Unicode form or what cannot be seen."""
    return [pair for pair in pairs if normal_form(pair.chosen) != normal_form(pair.rejected)]


def without_contradictions(pairs: Iterable[Preference]) -> list[Preference]:
    """Where rows say A over B and others B over A, keep the side with more summed strength; neither if they are even.

    The strength of a row is its margin times its votes.
    """
    pairs = list(pairs)
    sides: defaultdict[Content, list[float]] = defaultdict(list)
    for pair in pairs:
        sides[pair.content].append(pair.margin * pair.num_votes)
    # sorted: a sum of floats depends on the order of its terms
    weight = {content: sum(sorted(strengths)) for content, strengths in sides.items()}

    def stands(pair: Preference) -> bool:
        group, chosen, rejected = pair.content
        opposite = weight.get((group, rejected, chosen))
        return opposite is None or weight[pair.content] > opposite

    return [pair for pair in pairs if stands(pair)]
