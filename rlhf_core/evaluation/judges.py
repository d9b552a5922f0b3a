"""Scores of single responses made into a judge of two, and the gold scorer's grades (`judge_registry` has the judges).

A score judge looks at one response at a time, so the order in which two are shown cannot move it; it goes through
`ab.both_orders` like any other judge, and the consistency it reports there is a check and no assumption.
"""

from collections.abc import Sequence

from rlhf_core.demo.gold import Grade, grade
from rlhf_core.errors import check_finite
from rlhf_core.evaluation.ab import Choice, Judge


def score_judge(tolerance: float) -> Judge[float]:
    """Return a judge that is shown scores in place of responses: the higher wins, within `tolerance` is a tie.

    It raises Diverged for a score that is no finite number: NaN would lose against anything shown first, and win
    shown second.
    """

    def judge(prompts: Sequence[str], first: Sequence[float], second: Sequence[float]) -> list[Choice]:
        check_finite(first, "evaluate: the score of response")
        check_finite(second, "evaluate: the score of response")
        return [_higher(one - other, tolerance) for one, other in zip(first, second, strict=True)]

    return judge


def _higher(difference: float, tolerance: float) -> Choice:
    if abs(difference) <= tolerance:
        return "tie"
    return "first" if difference > 0 else "second"


def gold_grades(prompts: Sequence[str], responses: Sequence[str], finished: Sequence[bool]) -> list[Grade]:
    """Grade responses with the demo world's gold scorer; a simulated judgement, never a person's.

    Raises DataError for a prompt that the demo world did not make.
    """
    return [grade(*row) for row in zip(prompts, responses, finished, strict=True)]


def gold_scores(prompts: Sequence[str], responses: Sequence[str], finished: Sequence[bool]) -> list[float]:
    """The gold scorer's one number a response: what `align.ppo.guard.scorer` may name in the demo world."""
    return [one.gold for one in gold_grades(prompts, responses, finished)]
