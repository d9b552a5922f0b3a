"""Pairs beside the preferences on the whole: ties, where they are kept, and pairs on named criteria.

A criterion's pairs come from votes, comparisons and rankings that name it, cleaned like all others, and from grades.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhf_core.config import PreferencesConfig
from rlhf_core.data.cleaning.labelled import Preference, without_equal
from rlhf_core.data.cleaning.leakage import leaking_prompts
from rlhf_core.data.cleaning.other_pairs import (
    GRADED,
    cap_by_criterion,
    graded_pairs,
    to_tie,
    without_compared,
    without_decided,
)
from rlhf_core.data.reading.kinds import OVERALL
from tasks.stages.preferences.funnel import Funnel, Pairs, clean, leakage_reason
from tasks.tables import SCHEMAS

Row = dict[str, Any]


class OtherPairs:
    """All other pairs, each with its side, and a funnel for each criterion that somebody labelled pairs on.

    Attributes:
        rows: rows of `other_pairs.parquet`.
        funnels: by criterion; grades and ties are not counted in them.
    """

    def __init__(
        self,
        labelled: Iterable[Mapping[str, Any]],
        decided: Pairs,
        grades: Iterable[Mapping[str, Any]],
        config: PreferencesConfig,
    ) -> None:
        """Gather them.

        Args:
            labelled: rows of `pairs.parquet` on every criterion; gone through several times.
            decided: the cleaned pairs on the whole.
            grades: rows of `criteria.parquet`, each with its `split`.
        """
        self.funnels: dict[str, Funnel] = {}
        self._config = config
        self.rows = self._labelled(labelled, decided)
        graded = graded_pairs(grades, config.min_grade_gap, keep_ties=config.keep_ties)
        self.rows += without_compared(graded, labelled)

    def prompts(self, split: str) -> list[str]:
        """The prompt of every pair of one side."""
        return [row["prompt"] for row in self.rows if row["split"] == split]

    def finish(self, heldout_prompts: Sequence[str]) -> None:
        """Leave out training pairs whose prompt is nearly a held-out one, cap them a prompt and criterion, and sort."""
        config, most = self._config, self._config.max_pairs_per_prompt
        leaking = leaking_prompts(
            self.prompts("train"), heldout_prompts, config.leakage_threshold, one_word=config.leakage_one_word
        )
        self.rows = [row for row in self.rows if row["split"] == "heldout" or row["prompt"] not in leaking]
        self._record("leakage", leakage_reason(config))
        self.rows = cap_by_criterion(self.rows, most)
        self._record("cap_per_prompt", f"training prompts with more than {most} pairs")
        self.rows.sort(key=lambda row: (row["criterion"], row["prompt_id"], row["pair_id"]))

    def figures(self) -> dict[str, Any]:
        """Counts for `preferences.json`; nothing where there is nothing."""
        training = [row for row in self.rows if row["split"] == "train"]
        heldout = [row for row in self.rows if row["split"] == "heldout"]
        found: dict[str, Any] = {
            "ties_train": sum(row["tie"] for row in training),
            "criteria": _by_criterion(training),
            "criteria_heldout": _by_criterion(heldout),
            "criteria_removed": {name: funnel.removed() for name, funnel in self.funnels.items()},
        }
        return {name: value for name, value in found.items() if value}

    def _labelled(self, rows: Iterable[Mapping[str, Any]], decided: Pairs) -> list[Row]:
        found: list[Row] = []
        for name in sorted({row["criterion"] for row in rows}):
            pairs = decided
            if name != OVERALL:
                pairs, self.funnels[name] = clean((row for row in rows if row["criterion"] == name), self._config)
                found += [_row(pair, name, tie=False) for pair in pairs]
            if self._config.keep_ties:
                ties = [tie for row in rows if row["criterion"] == name and (tie := to_tie(row))]
                found += [_row(tie, name, tie=True) for tie in without_decided(without_equal(ties), pairs)]
        return found

    def _record(self, step: str, reason: str) -> None:
        for name, funnel in self.funnels.items():
            left = sum(row["criterion"] == name and row["source"] != GRADED and not row["tie"] for row in self.rows)
            funnel.record(step, left, reason)


def _by_criterion(rows: Iterable[Row]) -> dict[str, int]:
    return dict(sorted(Counter(row["criterion"] for row in rows if not row["tie"]).items()))


def _row(pair: Preference, criterion: str, *, tie: bool) -> Row:
    own = {name: getattr(pair, name) for name in (*SCHEMAS["train"].names, "split")}
    return own | {"criterion": criterion, "tie": tie}
