"""Candidates against each other, and against the SFT model task by task, on responses that are judged already."""

from collections.abc import Mapping, Sequence
from itertools import combinations, compress
from typing import Any

from rlhf_core.config import EvaluateConfig
from rlhf_core.evaluation.ab import TIE_WITHIN, Outcome, both_orders, summarise
from rlhf_core.evaluation.judges import score_judge
from rlhf_core.evaluation.response_set import JudgedSet


def head_to_head(
    settings: EvaluateConfig, candidates: Sequence[str], judged: Mapping[tuple[str, float], JudgedSet]
) -> dict[str, Any]:
    """How every two candidates fare against each other; empty for one candidate.

    Args:
        settings: the section `evaluate`.
        candidates: in the order of the parameters; of two the first is A.
        judged: response sets by model and temperature.

    Returns:
        `<a>_against_<b>` -> judge -> `T=<temperature>` -> what `ab.summarise` returns of A. As many intervals as there
        are pairs hold all at once, and p-values are multiplied by their number.
    """
    pairs = list(combinations(candidates, 2))
    return {
        f"{a}_against_{b}": {
            judge: {
                f"T={temperature:g}": summarise(
                    _outcomes(judge, judged[a, temperature], judged[b, temperature]), settings.confidence, len(pairs)
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


def _outcomes(judge: str, a: JudgedSet, b: JudgedSet) -> list[Outcome]:
    shown = [""] * len(a.scores[judge])  # the judge of scores reads no prompts
    return both_orders(score_judge(TIE_WITHIN[judge]), shown, a.scores[judge], b.scores[judge]).outcomes
