"""Labels from data files: votes, comparisons and rankings as ballots, one for each pair of responses and criterion."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain, combinations
from statistics import fmean
from typing import Any

from rlhf_core.data.reading.kinds import OVERALL, UNNAMED
from rlhf_core.data.reading.rankings import RANKINGS, ranked_choices
from rlhf_core.errors import DataError
from rlhf_core.feedback.ballots import Ballot, Pair, Vote
from rlhf_core.feedback.labelling import pair_id
from rlhf_core.text.identity import content_id, prompt_identity
from rlhf_core.text.normal import normal_form
from tasks import paths
from tasks.frame.stage import Stage
from tasks.stages.held_out import with_split
from tasks.tables import read_table

Row = Mapping[str, Any]

JUDGEMENTS = ("votes", "comparisons", "rankings")
"""Kinds of rows that people's judgements stand in, those that go first before others."""


def from_file(stage: Stage) -> Iterator[Ballot]:
    """On each criterion the votes of the data files or, where it has none, their comparisons and rankings.

    On `overall`, where there are none of these, the grades: see `_graded`.

    Raises:
        DataError: one `pair_id` stands for two pairs.
    """
    votes = read_table(paths.VALIDATE / "votes.parquet")
    voted_on = set(votes.unique("criterion"))
    yield from voted(with_split(votes))
    box = BallotBox(shown=False)
    for row in read_table(paths.VALIDATE / "comparisons.parquet"):
        if row["criterion"] not in voted_on:
            _compare(box, row)
    for row in read_table(paths.VALIDATE / "rankings.parquet"):
        if row["criterion"] not in voted_on:
            _rank(box, row)
    ballots = list(box.ballots())
    yield from ballots
    if OVERALL not in voted_on and not any(ballot.pair.criterion == OVERALL for ballot in ballots):
        yield from _graded(read_table(paths.VALIDATE / "ratings.parquet"))


def passed_over(reads: Collection[str]) -> dict[str, int]:
    """Rows of votes, comparisons and rankings that label nothing, by kind; kinds without any are absent.

    Of the kinds that a label source `reads`, these are comparisons and rankings on a criterion that there are votes on.
    """
    votes, *others = JUDGEMENTS
    criteria = {kind: read_table(paths.VALIDATE / f"{kind}.parquet")["criterion"] for kind in JUDGEMENTS}
    voted_on = set(criteria[votes]) if votes in reads else set()
    found = {votes: 0 if votes in reads else len(criteria[votes])}
    for kind in others:
        found[kind] = sum(kind not in reads or criterion in voted_on for criterion in criteria[kind])
    return {kind: count for kind, count in found.items() if count}


class BallotBox:
    """Votes gathered by pair and criterion, in order of first appearance.

    Args:
        shown: people saw the two responses in the order of the pair.
    """

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown
        self._pairs: dict[tuple[str, str], Pair] = {}
        self._votes: dict[tuple[str, str], dict[tuple[str, str | int], Vote]] = {}
        self._rankings: dict[tuple[str, str], dict[str, None]] = {}

    def pair(self, pair: Pair) -> Pair:
        """The pair as it was first seen, whose order of responses all its votes must have."""
        return self._pairs.setdefault((pair.pair_id, pair.criterion), pair)

    def add(self, pair: Pair, vote: Vote, *, named: bool, ranking: str = "") -> None:
        """Count a vote on a pair that `pair` has given out.

        Args:
            named: the last vote of the annotator on the pair in the same ranking, or in none, counts; else all do, for
                the unnamed may be many.
            ranking: identity of the ranking that the vote comes from.
        """
        key = pair.pair_id, pair.criterion
        votes = self._votes.setdefault(key, {})
        votes[vote.annotator, ranking if named else len(votes)] = vote
        if ranking:
            self._rankings.setdefault(key, {})[ranking] = None

    def ballots(self) -> Iterator[Ballot]:
        """Every pair with its votes."""
        for key, pair in self._pairs.items():
            rankings = tuple(self._rankings.get(key, ()))
            yield Ballot(pair=pair, votes=tuple(self._votes[key].values()), rankings=rankings, shown=self._shown)


def voted(rows: Iterable[Row]) -> Iterator[Ballot]:
    """Group vote rows by pair; people may have been shown its two responses in either order."""
    box = BallotBox(shown=True)
    for row in rows:
        shown = _pair(row, row["response_a"], row["response_b"], row["pair_id"])
        box.add(pair := box.pair(shown), _as_shown(pair, row), named=True)
    yield from box.ballots()


def _as_shown(pair: Pair, row: Row) -> Vote:
    """A row's vote in the order of `pair`."""
    vote = Vote(annotator=row["annotator"], choice=row["choice"], strength=row["strength"], seconds=row["seconds"])
    one, other = normal_form(row["response_a"]), normal_form(row["response_b"])
    if prompt_identity(row["prompt"]) == prompt_identity(pair.prompt):
        here = normal_form(pair.response_a), normal_form(pair.response_b)
        if here == (one, other):
            return vote
        if here == (other, one):
            return Vote.from_signed(vote.annotator, -vote.signed, seconds=vote.seconds)
    raise DataError(
        f"votes: pair_id: {pair.pair_id!r} stands for two different pairs of responses. "
        "Fix: give each pair an id of its own, or leave the column out"
    )


def _compare(box: BallotBox, row: Row) -> None:
    """One vote for the chosen response; rows on the same pair, even contradictory ones, are one ballot."""
    vote = Vote(annotator=row["annotator"], choice="a", strength=row["strength"])
    _add(box, row, row["chosen"], row["rejected"], vote)


def _rank(box: BallotBox, row: Row) -> None:
    """One vote a pair of the ranked responses. A ranking says which is better and not by how much: strength 1.

    Its identity is what was ranked: orders of the same responses are votes on one ranking, other responses are another.
    """
    identity = content_id(RANKINGS, row["prompt_id"], row["criterion"], *sorted(row["responses"]))
    for one, other, choice in ranked_choices(row["responses"], row["ranking"]):
        _add(box, row, one, other, Vote(annotator=row["annotator"], choice=choice), identity)


def _graded(rows: Iterable[Row]) -> Iterator[Ballot]:
    """Each two responses to a prompt as a pair, with one vote of everybody who graded both, for the higher grade.

    So nobody's severity counts, only their order, at strength 1; equal grades are a tie. Two responses that nobody
    graded both have one vote, by the means of their grades. Those without a name are one grader, with their mean.
    """
    box = BallotBox(shown=False)
    grades: dict[str, dict[str, dict[str, list[float]]]] = {}
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row["prompt"], {**row, "task": "", "criterion": OVERALL})
        by_response = grades.setdefault(row["prompt"], {})
        by_response.setdefault(row["response"], {}).setdefault(row["annotator"], []).append(row["score"])
    for prompt, by_response in grades.items():
        for (one, ones), (other, others) in combinations(by_response.items(), 2):
            graders = sorted(ones.keys() & others.keys())
            scores = [(name, fmean(ones[name]), fmean(others[name])) for name in graders]
            everyone = (UNNAMED, fmean(chain(*ones.values())), fmean(chain(*others.values())))
            for name, score, beside in scores or [everyone]:
                vote = Vote.from_signed(name, (score > beside) - (score < beside))
                _add(box, first[prompt], one, other, vote)
    yield from box.ballots()


def _add(box: BallotBox, row: Row, one: str, other: str, vote: Vote, ranking: str = "") -> None:
    identity = pair_id(row["prompt_id"], one, other)
    pair = box.pair(_pair(row, one, other, identity))
    turned = vote if pair.response_a == one else Vote.from_signed(vote.annotator, -vote.signed)
    box.add(pair, turned, named=vote.annotator != UNNAMED, ranking=ranking)


def _pair(row: Row, response_a: str, response_b: str, identity: str) -> Pair:
    return Pair(
        pair_id=identity,
        prompt_id=row["prompt_id"],
        prompt=row["prompt"],
        task=row["task"],
        split=row["split"],
        response_a=response_a,
        response_b=response_b,
        criterion=row["criterion"],
    )
