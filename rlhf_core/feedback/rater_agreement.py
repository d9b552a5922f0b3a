"""How far annotators agree, from the votes of a labelling round.

Chance-corrected figures depend on how often each answer is given, so on which response stands first. Where people were
shown an order, it is that one. Comparisons and rankings name the better response first and know no order: there the
responses are put into one that their texts alone decide, as if each pair had been shown at random. (With the chosen one
always first, full agreement would be what chance gives, and only contradictions would count.)
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

from rlhf_core.data.reading.kinds import UNNAMED
from rlhf_core.feedback.agreement import cohen_kappa, fleiss_kappa, krippendorff_alpha, ordinal_alpha
from rlhf_core.feedback.ballots import Ballot, mean_or_none


def signed_votes(ballot: Ballot) -> list[int]:
    """The votes as signed strengths, positive for the response that stands first in the order described above."""
    sign = 1 if ballot.shown or _place(ballot.pair.response_a) <= _place(ballot.pair.response_b) else -1
    return [sign * vote.signed for vote in ballot.votes]


def agreement_figures(ballots: Sequence[Ballot]) -> dict[str, int | float | None]:
    """Kappa and alpha of the choices, the ordinal alpha of the signed strengths, and on how much they rest.

    Returns:
        `num_pairs_voted_again`: pairs with at least two votes, without which nothing is defined; Fleiss' kappa,
        Krippendorff's alpha; `mean_cohen_kappa`, the mean over all two annotators for whom it is defined (Light 1971).
    """
    strengths = [signed_votes(ballot) for ballot in ballots]
    choices = [[_sign(signed) for signed in votes] for votes in strengths]
    kappas = [row["cohen_kappa"] for row in cohen_table(ballots) if row["cohen_kappa"] is not None]
    return {
        "num_pairs_voted_again": sum(len(votes) > 1 for votes in choices),
        "fleiss_kappa": fleiss_kappa(choices),
        "krippendorff_alpha": krippendorff_alpha(choices),
        "mean_cohen_kappa": mean_or_none(kappas),
        "strength_alpha": ordinal_alpha(strengths),
    }


def cohen_table(ballots: Iterable[Ballot]) -> list[dict[str, Any]]:
    """Cohen's kappa of every two named annotators on the pairs that both voted on, by name.

    Returns:
        For each: `annotators`, `num_pairs`, `agreement` (share of the pairs with the same choice), `cohen_kappa`, which
        is None where it is undefined. Of who voted twice on a pair (in two rankings) the last vote counts.
    """
    both: defaultdict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for ballot in ballots:
        votes = zip(ballot.votes, signed_votes(ballot), strict=True)
        last = {vote.annotator: _sign(signed) for vote, signed in votes if vote.annotator != UNNAMED}
        for one, other in combinations(sorted(last), 2):
            both[one, other].append((last[one], last[other]))
    return [
        {
            "annotators": list(names),
            "num_pairs": len(rated),
            "agreement": sum(one == other for one, other in rated) / len(rated),
            "cohen_kappa": cohen_kappa(rated),
        }
        for names, rated in sorted(both.items())
    ]


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)


def _place(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
