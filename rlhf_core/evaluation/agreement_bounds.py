"""How sure the agreement figures of a labelling round are: intervals over prompts."""

from collections.abc import Sequence
from typing import Any

from rlhf_core.evaluation.agreement_intervals import (
    agreement_intervals,
    alpha_of,
    kappa_of,
    ordinal_alpha_of,
    why_no_interval,
)
from rlhf_core.evaluation.intervals import bounds, why_no_bounds
from rlhf_core.feedback.ballots import Ballot
from rlhf_core.feedback.rater_agreement import signed_votes

CONFIDENCE = 0.95


def agreement_bounds(ballots: Sequence[Ballot]) -> dict[str, Any]:
    """Bounds of `fleiss_kappa`, `krippendorff_alpha` and `strength_alpha`; `undefined` says why one is None.

    Of the very votes that `rater_agreement.agreement_figures` counts, in the order of responses that it says.
    """
    prompts = [ballot.pair.prompt_id for ballot in ballots]
    strengths = [signed_votes(ballot) for ballot in ballots]
    choices = [["a" if signed > 0 else "b" if signed else "tie" for signed in votes] for votes in strengths]
    nominal = {"fleiss_kappa": kappa_of, "krippendorff_alpha": alpha_of}
    intervals = agreement_intervals(prompts, choices, nominal, CONFIDENCE)
    intervals |= agreement_intervals(prompts, strengths, {"strength_alpha": ordinal_alpha_of}, CONFIDENCE)
    reasons = dict.fromkeys(intervals, why_no_interval(prompts) or "undefined, or undefined without one of the prompts")
    if len({len(ratings) for ratings in choices}) > 1:  # chance is then counted item by item, which no matrix holds
        intervals["fleiss_kappa"] = None
        reasons["fleiss_kappa"] = why_no_interval(prompts) or "its interval needs equally many votes a pair"
    found: dict[str, Any] = {}
    undefined: dict[str, str] = {}
    for figure, interval in intervals.items():
        found |= bounds(figure, interval)
        undefined |= why_no_bounds(found, figure, reasons[figure])
    return found | {"undefined": undefined}
