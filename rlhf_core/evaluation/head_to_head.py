"""Candidates against each other, and against the SFT model task by task."""

from collections.abc import Mapping, Sequence
from itertools import combinations, compress
from typing import Any

from rlhf_core.config import EvaluateConfig
from rlhf_core.evaluation.ab import Outcome, Verdicts, summarise


def head_to_head(
    settings: EvaluateConfig, candidates: Sequence[str], compared: Mapping[tuple[str, str, float, str], Verdicts]
) -> dict[str, Any]:
    """How every two candidates fare against each other; empty for one candidate.

    Args:
        settings: the section `evaluate`.
        candidates: in the order of the parameters; of two the first is A.
        compared: verdicts by A, B, temperature and judge.

    Returns:
        `<a>_against_<b>` -> judge -> `T=<temperature>` -> what `ab.summarise` returns of A. As many intervals as there
        are pairs hold all at once, and p-values are multiplied by their number.
    """
    pairs = list(combinations(candidates, 2))
    return {
        f"{a}_against_{b}": {
            judge: {
                f"T={temperature:g}": summarise(
                    compared[a, b, temperature, judge].outcomes, settings.confidence, len(pairs)
                )
                for temperature in settings.temperatures
            }
            for judge in settings.judges
        }
        for a, b in pairs
    }


def by_task(
    outcomes: Sequence[Outcome], tasks: Sequence[str], confidence: float, candidates: int
) -> dict[str, dict[str, Any]]:
    """What `ab.summarise` returns of the prompts of each task, in the order of their names; none without names.

    Intervals are those of one task: among twenty tasks one is expected outside of a 95 % interval by chance.
    """
    return {
        task: summarise(list(compress(outcomes, [one == task for one in tasks])), confidence, candidates)
        for task in sorted(set(tasks) - {""})
    }
