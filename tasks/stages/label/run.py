"""Stage `label`: votes on pairs of responses, and the label that each pair gets from them."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rlhf_core.data.reading.kinds import OVERALL
from rlhf_core.data.reading.rankings import ranking_source
from rlhf_core.errors import DataError
from rlhf_core.evaluation.agreement_bounds import agreement_bounds
from rlhf_core.feedback.ballots import Ballot, Majority
from rlhf_core.feedback.labelling import aggregate, annotator_table, summary, why_undefined
from rlhf_core.feedback.rater_agreement import cohen_table
from rlhf_core.state.atomic import write_json
from tasks.frame.stage import Stage
from tasks.stages.label.files import passed_over
from tasks.stages.label.sources import SOURCES
from tasks.stages.notice import warn
from tasks.tables import SCHEMAS, write_table


def run(stage: Stage) -> dict[str, Any]:
    """Collect votes from the source, write `votes.parquet`, `pairs.parquet` and `annotators.json`.

    Raises:
        DataError: the source has no pair with enough votes.
    """
    config = stage.params.label
    source = SOURCES[config.source]
    collected = list(source.ballots(stage))
    ballots = [ballot for ballot in collected if len(ballot.votes) >= config.min_votes]
    left_out = {"pairs_below_min_votes": len(collected) - len(ballots), "passed_over": passed_over(source.reads)}
    _say_what_is_left_out(stage, source.reads, left_out)
    if not ballots:
        raise DataError(
            f"label.source: '{config.source}' gave no pair with {config.min_votes} or more votes. "
            "Fix: name votes, comparisons or rankings under data, choose another source, or lower label.min_votes"
        )
    verdicts = [aggregate(ballot.votes) for ballot in ballots]
    write_table(stage.out / "votes.parquet", _vote_rows(ballots, config.source), SCHEMAS["label_votes"])
    write_table(stage.out / "pairs.parquet", _pair_rows(ballots, verdicts, config.source), SCHEMAS["pairs"])
    write_json(stage.out / "annotators.json", _annotators(ballots, config.source))
    figures, undefined = source.figures(ballots, verdicts)
    metrics = _figures(ballots, verdicts) | left_out | figures
    metrics["undefined"] |= undefined
    return metrics


def _say_what_is_left_out(stage: Stage, reads: Collection[str], left_out: Mapping[str, Any]) -> None:
    config = stage.params.label
    if few := left_out["pairs_below_min_votes"]:
        warn(stage, f"{few} pairs have fewer than label.min_votes {config.min_votes} votes; they are left out")
    for kind, count in left_out["passed_over"].items():
        if kind in reads:
            said = f"{count} rows of data.{kind} label nothing: there are votes on their criterion, which go first"
            warn(stage, said)


def _annotators(ballots: Sequence[Ballot], source: str) -> dict[str, Any]:
    """What each annotator did, and on each criterion how far each two of them agree."""
    by_criterion: dict[str, list[Ballot]] = {}
    for ballot in ballots:
        by_criterion.setdefault(ballot.pair.criterion, []).append(ballot)
    agreement = {name: cohen_table(own) for name, own in sorted(by_criterion.items())}
    return {"source": source, "annotators": annotator_table(ballots), "agreement": agreement}


def _figures(ballots: Sequence[Ballot], verdicts: Sequence[Majority]) -> dict[str, Any]:
    """The summary of `overall`, and under `criteria` one of each other criterion, where there are some.

    Criteria are never pooled: each is a question of its own, and how often people answer it in one way or the other by
    chance, which kappa and alpha correct for, is its own too.
    """
    by_criterion: dict[str, list[tuple[Ballot, Majority]]] = {OVERALL: []}
    for ballot, verdict in zip(ballots, verdicts, strict=True):
        by_criterion.setdefault(ballot.pair.criterion, []).append((ballot, verdict))
    figures: dict[str, dict[str, Any]] = {}
    for name, own in by_criterion.items():
        figures[name] = _of_criterion([ballot for ballot, _ in own], [verdict for _, verdict in own])
    headline = figures.pop(OVERALL)
    return headline | ({"criteria": dict(sorted(figures.items()))} if figures else {})


def _of_criterion(ballots: Sequence[Ballot], verdicts: Sequence[Majority]) -> dict[str, Any]:
    """The figures of one criterion with their bounds; `undefined` says why one is None."""
    found, ends = summary(ballots, verdicts), agreement_bounds(ballots)
    why = why_undefined(found, ballots)
    of_ends = {end: reason for name, reason in why.items() for end in (f"{name}_low", f"{name}_high") if end in ends}
    return found | ends | {"undefined": ends["undefined"] | of_ends | why}


def _vote_rows(ballots: Iterable[Ballot], source: str) -> Iterator[dict[str, Any]]:
    for ballot in ballots:
        for vote in ballot.votes:
            yield asdict(ballot.pair) | asdict(vote) | {"source": _source(ballot, source)}


def _pair_rows(ballots: Sequence[Ballot], verdicts: Sequence[Majority], source: str) -> Iterator[dict[str, Any]]:
    for ballot, verdict in zip(ballots, verdicts, strict=True):
        counted = {"num_votes": len(ballot.votes), "source": _source(ballot, source)}
        yield asdict(ballot.pair) | asdict(verdict) | counted


def _source(ballot: Ballot, source: str) -> str:
    """Where the votes come from: the label source, or the rankings, whose pairs belong together."""
    return ranking_source(ballot.rankings) if ballot.rankings else source
