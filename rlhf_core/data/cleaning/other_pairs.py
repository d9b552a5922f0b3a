"""Pairs that say something else than which response is better on the whole: ties, and those on a named criterion."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, combinations
from statistics import fmean
from typing import Any

from rlhf_core.data.cleaning.labelled import Preference, response_key
from rlhf_core.data.reading.rankings import is_ranked
from rlhf_core.text.identity import content_id, prompt_id, prompt_identity
from rlhf_core.text.normal import normal_form

GRADED = "graded"
Row = dict[str, Any]


def to_tie(row: Mapping[str, Any]) -> Preference | None:
    """Read a row of `pairs.parquet` as a tie, its first response in the place of the chosen one; None of any other."""
    if row["label"] != "tie":
        return None
    names = ("pair_id", "prompt_id", "prompt", "task", "split", "num_votes", "agreement", "margin", "source")
    return Preference(
        group=prompt_identity(row["prompt"]),
        chosen=row["response_a"],
        rejected=row["response_b"],
        **{name: row[name] for name in names},
    )


def without_decided(ties: Iterable[Preference], decided: Iterable[Preference]) -> list[Preference]:
    """Ties without those on two responses that other rows prefer one of, and without second ties on the same two."""
    seen = {_both(pair) for pair in decided}
    kept = []
    for tie in ties:
        if _both(tie) not in seen:
            seen.add(_both(tie))
            kept.append(tie)
    return kept


@dataclass(slots=True)
class _Graded:
    """A response and its grades on one criterion, by annotator; those without a name are one annotator's."""

    response: str
    grades: dict[str, list[float]] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """The mean of all grades."""
        return fmean(chain(*self.grades.values()))


def graded_pairs(rows: Iterable[Mapping[str, Any]], min_gap: float, *, keep_ties: bool) -> Iterator[Row]:
    """All pairs of responses to a prompt that were graded on the same criterion, the better one as chosen.

    A response's grade is the mean of its grades. Grades at most `min_gap` apart prefer nothing: such pairs are ties,
    which are left out or kept. `margin` is the difference of the grades, 0 for a tie; `agreement` the share that find
    the same of those who graded both responses, 1 where nobody did.
    """
    graded: defaultdict[tuple[str, str, str], dict[str, _Graded]] = defaultdict(dict)
    for row in rows:
        by_response = graded[row["criterion"], row["prompt"], row["split"]]
        one = by_response.setdefault(normal_form(row["response"]), _Graded(row["response"]))
        one.grades.setdefault(row["annotator"], []).append(row["score"])
    for (criterion, prompt, split), responses in graded.items():
        for one, other in combinations(responses.values(), 2):
            better, worse = (one, other) if one.score >= other.score else (other, one)
            gap = better.score - worse.score
            tie = gap <= min_gap
            if tie and not keep_ties:
                continue
            yield {
                "pair_id": content_id(GRADED, criterion, prompt, better.response, worse.response),
                "prompt_id": prompt_id(prompt),
                "prompt": prompt,
                "task": "",
                "split": split,
                "chosen": better.response,
                "rejected": worse.response,
                "agreement": _share_that_agree(better, worse, min_gap, tie=tie),
                "margin": 0.0 if tie else gap,
                "source": GRADED,
                "criterion": criterion,
                "tie": tie,
            }


def _share_that_agree(better: _Graded, worse: _Graded, min_gap: float, *, tie: bool) -> float:
    both = better.grades.keys() & worse.grades.keys()
    gaps = [fmean(better.grades[name]) - fmean(worse.grades[name]) for name in both]
    agree = [abs(gap) <= min_gap if tie else gap > min_gap for gap in gaps]
    return fmean(agree) if agree else 1.0


def without_compared(graded: Iterable[Row], labelled: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Pairs of grades without those on two responses that people compared on the same criterion, with any result."""
    wanted = list(graded)
    criteria = {row["criterion"] for row in wanted}
    compared = {
        (row["criterion"], *_of_row(row, "response_a", "response_b"))
        for row in labelled
        if row["criterion"] in criteria
    }
    return [row for row in wanted if (row["criterion"], *_of_row(row, "chosen", "rejected")) not in compared]


def cap_by_criterion(rows: Iterable[Row], most: int) -> list[Row]:
    """Keep at most `most` training rows of each prompt and criterion, drawn by a hash of their content.

    Held-out rows stay, and so do pairs of rankings, which do not count: a ranking without some of its pairs is none.
    """
    counts: defaultdict[tuple[str, str], int] = defaultdict(int)
    kept = []
    for row in sorted(rows, key=lambda row: content_id("cap", row["pair_id"], row["chosen"], row["rejected"])):
        if row["split"] == "train" and not is_ranked(row["source"]):
            key = (prompt_identity(row["prompt"]), row["criterion"])
            counts[key] += 1
            if counts[key] > most:
                continue
        kept.append(row)
    return kept


def _both(pair: Preference) -> tuple[str, frozenset[bytes]]:
    return pair.group, frozenset((response_key(pair.chosen), response_key(pair.rejected)))


def _of_row(row: Mapping[str, Any], one: str, other: str) -> tuple[str, frozenset[bytes]]:
    return prompt_identity(row["prompt"]), frozenset((response_key(row[one]), response_key(row[other])))
