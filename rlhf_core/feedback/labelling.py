"""What votes on pairs of responses add up to: pairs, majorities, and the figures of a labelling round."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from rlhf_core.data.reading.kinds import UNNAMED
from rlhf_core.feedback.ballots import AddressedRandom, Ballot, Choice, Majority, Pair, Vote, mean_or_none
from rlhf_core.feedback.rater_agreement import agreement_figures, cohen_table
from rlhf_core.text.identity import content_id


def pair_id(prompt_id: str, response_a: str, response_b: str) -> str:
    """Identity of a comparison, whichever response is shown first: 16 hex digits."""
    first, second = sorted((response_a, response_b))
    return content_id(prompt_id, first, second)


def make_pairs(
    prompt_id: str, prompt: str, task: str, split: str, responses: Iterable[str], rng: AddressedRandom
) -> list[Pair]:
    """All pairs of different responses to a prompt, each shown in an order drawn from its own address."""
    pairs = []
    for first, second in combinations(dict.fromkeys(responses), 2):
        identity = pair_id(prompt_id, first, second)
        response_a, response_b = sorted((first, second))
        if rng(f"order/{identity}").random() < 0.5:
            response_a, response_b = response_b, response_a
        pairs.append(
            Pair(
                pair_id=identity,
                prompt_id=prompt_id,
                prompt=prompt,
                task=task,
                split=split,
                response_a=response_a,
                response_b=response_b,
            )
        )
    return pairs


def aggregate(votes: Sequence[Vote]) -> Majority:
    """The side with more votes; a tie when both have as many, or when more votes say tie than name that side.

    Raises:
        ValueError: there is no vote.
    """
    if not votes:
        raise ValueError("a pair without votes has no majority")
    count = Counter(vote.choice for vote in votes)
    side: Choice = "a" if count["a"] > count["b"] else "b"
    if count["a"] == count["b"] or count["tie"] > count[side]:
        return Majority(label="tie", agreement=count["tie"] / len(votes), margin=0.0)
    signed = sum(vote.signed for vote in votes) / len(votes)
    return Majority(label=side, agreement=count[side] / len(votes), margin=max(0.0, signed if side == "a" else -signed))


def annotator_table(ballots: Iterable[Ballot]) -> dict[str, dict[str, Any]]:
    """What each annotator did, by name in sorted order, over all criteria; each ballot is on one.

    Returns:
        For each: `num_votes`; `tie_share`; `first_share`, of the votes that take a side, those for the response
        shown first, where an order was shown; `agreement`, the share of votes equal to the verdict of all other
        annotators of the pair; `mean_seconds`. A figure without anything to count is None.
    """
    votes: defaultdict[str, list[Vote]] = defaultdict(list)
    first: defaultdict[str, list[bool]] = defaultdict(list)
    agrees: defaultdict[str, list[bool]] = defaultdict(list)
    for ballot in ballots:
        for place, vote in enumerate(ballot.votes):
            votes[vote.annotator].append(vote)
            if ballot.shown and vote.choice != "tie":
                first[vote.annotator].append(vote.choice == "a")
            around = [*ballot.votes[:place], *ballot.votes[place + 1 :]]
            others = [one for one in around if one.annotator != vote.annotator or one.annotator == UNNAMED]
            if others:
                agrees[vote.annotator].append(vote.choice == aggregate(others).label)
    return {
        name: {
            "num_votes": len(votes[name]),
            "tie_share": mean_or_none([vote.choice == "tie" for vote in votes[name]]),
            "first_share": mean_or_none(first[name]),
            "agreement": mean_or_none(agrees[name]),
            "mean_seconds": mean_or_none([vote.seconds for vote in votes[name] if vote.seconds is not None]),
        }
        for name in sorted(votes)
    }


def summary(ballots: Sequence[Ballot], verdicts: Sequence[Majority]) -> dict[str, int | float | None]:
    """Headline figures of a labelling round on one criterion; one that is undefined for its votes is None.

    Returns:
        Counts; `tie_share` of the pairs; `mean_agreement` over all pairs; `mean_vote_margin` and `first_share` (the
        response shown first is preferred, where an order was shown) over the decided ones; `agreement_figures`.
    """
    shown = [verdict for ballot, verdict in zip(ballots, verdicts, strict=True) if ballot.shown]
    decided = [verdict for verdict in verdicts if verdict.label != "tie"]
    return {
        "num_labelled_pairs": len(ballots),
        "num_labelled_heldout_pairs": sum(ballot.pair.split == "heldout" for ballot in ballots),
        "num_votes": sum(len(ballot.votes) for ballot in ballots),
        "num_annotators": len({vote.annotator for ballot in ballots for vote in ballot.votes}),
        "tie_share": mean_or_none([verdict.label == "tie" for verdict in verdicts]),
        "mean_agreement": mean_or_none([verdict.agreement for verdict in verdicts]),
        "mean_vote_margin": mean_or_none([verdict.margin for verdict in decided]),
        "first_share": mean_or_none([verdict.label == "a" for verdict in shown if verdict.label != "tie"]),
        **agreement_figures(ballots),
    }


def why_undefined(figures: Mapping[str, Any], ballots: Sequence[Ballot]) -> dict[str, str]:
    """The reason under each figure of `summary` that is None for these ballots: entries of `undefined`."""
    shown = any(ballot.shown for ballot in ballots)
    agreement = "every answer is the same" if figures["num_pairs_voted_again"] else "no pair has two votes"
    met = bool(cohen_table(ballots))
    reasons = {
        "tie_share": "no pair is labelled",
        "mean_agreement": "no pair is labelled",
        "mean_vote_margin": "no pair is decided",
        "first_share": "no pair that was shown in an order is decided" if shown else "no order was shown",
        **dict.fromkeys(("fleiss_kappa", "krippendorff_alpha", "strength_alpha"), agreement),
        "mean_cohen_kappa": "every two annotators gave one answer only" if met else "no two annotators share a pair",
    }
    return {name: reason for name, reason in reasons.items() if figures[name] is None}
