"""How often versions were held against the same opponent on the same prompts, and what that leaves of the error.

With enough attempts a version that is no better passes a gate by chance. So each attempt has a part of the error only
(`rlhf_core.evaluation.selection.confidence_of_attempt`), counted from the audit trail, which refusals are in as well.
The same files tried again are the same attempt: nothing new is drawn.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf_core.state.atomic import digest_of
from tasks.tracking.audit import AuditRow
from tasks.tracking.gates import Gate
from tasks.tracking.names import ModelVersion

Figures = Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempts:
    """Which attempt this is, counted from 1: at a win over SFT, and at one over the champion, on these prompts."""

    at_sft: int = 1
    at_champion: int = 1


def judged_prompts(rows: Iterable[Mapping[str, Any]]) -> str:
    """`prompts_key` of recorded responses."""
    return prompts_key(str(row["prompt_id"]) for row in rows)


def prompts_key(prompt_ids: Iterable[str]) -> str:
    """Identity of a set of evaluation prompts; empty for none."""
    known = sorted(set(prompt_ids))
    return digest_of(known) if known else ""


def attempts_so_far(rows: Sequence[AuditRow], version: ModelVersion, champion: int | None, prompts: str) -> Attempts:
    """Read off the trail which attempt this version is on these prompts, at SFT and at this champion."""
    mine = [row for row in rows if row.model == version.name and row.action != "rollback" and row.gates]
    here = [row for row in mine if row.prompts == prompts and prompts and row.outcome == "done"]
    return Attempts(
        at_sft=_place(here, version.outputs_hash),
        at_champion=_place([row for row in here if row.champion_before == champion], version.outputs_hash),
    )


def _place(rows: Sequence[AuditRow], outputs_hash: str) -> int:
    tried = list(dict.fromkeys(row.outputs_hash for row in rows))
    return tried.index(outputs_hash) + 1 if outputs_hash in tried else len(tried) + 1


def win_rate_low_over_sft(figures: Figures, confidence: float, attempt: int) -> float | None:
    """The lower bound of the win rate over SFT at this attempt, from the counts of the evaluation.

    Never above the published bound, which is corrected for the candidates of its run; that one stands where a version
    carries no counts.
    """
    from rlhf_core.evaluation.intervals import too_few, win_rate_interval
    from rlhf_core.evaluation.selection import confidence_of_attempt, confidence_of_each

    published = figures.get("win_rate_low")
    counts = [figures.get(name) for name in ("wins", "ties", "losses")]
    wins, ties, losses = (int(count) for count in counts if count is not None) if None not in counts else (0, 0, 0)
    if published is None or too_few(wins + ties + losses):
        return published
    each = confidence_of_each(confidence, int(figures.get("num_candidates") or 1))
    return min(published, win_rate_interval(wins, ties, losses, confidence_of_attempt(each, attempt))[0])


def gates_by_attempt(gates: Sequence[Gate], attempts: Attempts) -> tuple[Gate, ...]:
    """The gates, those of win rates saying which attempt they are, after the first."""
    numbers = {"min_win_rate_low": attempts.at_sft, "min_win_rate_low_champion": attempts.at_champion}
    return tuple(
        replace(gate, detail=f"{gate.detail} (attempt {numbers[gate.name]} on these prompts)")
        if numbers.get(gate.name, 1) > 1
        else gate
        for gate in gates
    )
