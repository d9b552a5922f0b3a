"""Stage `label`: votes on pairs of responses, and the label that each pair gets from them."""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from rlhf_core.data.reading.kinds import OVERALL
from rlhf_core.data.reading.rankings import ranking_source
from rlhf_core.demo.annotators import gold_agreement, simulated_ballots
from rlhf_core.errors import DataError
from rlhf_core.evaluation.agreement_bounds import agreement_bounds
from rlhf_core.feedback.ballots import AddressedRandom, Ballot, Majority, Pair
from rlhf_core.feedback.labelling import aggregate, annotator_table, make_pairs, summary, why_undefined
from rlhf_core.feedback.rater_agreement import cohen_table
from rlhf_core.state.atomic import write_json
from tasks import paths
from tasks.frame.stage import Stage
from tasks.stages.label.files import from_file, passed_over
from tasks.stages.notice import warn
from tasks.tables import SCHEMAS, read_table, write_table


class LabelSource(Protocol):
    """Where votes come from: reads what the stage may read and yields each pair once, with all its votes."""

    def __call__(self, stage: Stage) -> Iterable[Ballot]: ...


def run(stage: Stage) -> dict[str, Any]:
    """Collect votes from the source, write `votes.parquet`, `pairs.parquet` and `annotators.json`.

    Raises:
        DataError: the source has no pair with enough votes.
    """
    config = stage.params.label
    collected = list(SOURCES[config.source](stage))
    ballots = [ballot for ballot in collected if len(ballot.votes) >= config.min_votes]
    left_out = {"pairs_below_min_votes": len(collected) - len(ballots), "passed_over": passed_over(config.source)}
    _say_what_is_left_out(stage, left_out)
    if not ballots:
        raise DataError(
            f"label.source: '{config.source}' gave no pair with {config.min_votes} or more votes. "
            "Fix: name votes, comparisons or rankings under data, choose another source, or lower label.min_votes"
        )
    verdicts = [aggregate(ballot.votes) for ballot in ballots]
    write_table(stage.out / "votes.parquet", _vote_rows(ballots, config.source), SCHEMAS["label_votes"])
    write_table(stage.out / "pairs.parquet", _pair_rows(ballots, verdicts, config.source), SCHEMAS["pairs"])
    write_json(stage.out / "annotators.json", _annotators(ballots, config.source))
    metrics = _figures(ballots, verdicts) | left_out
    if config.source == "simulated":
        metrics["majority_agrees_with_gold"] = agrees = gold_agreement(ballots, verdicts)
        if agrees is None:
            metrics["undefined"]["majority_agrees_with_gold"] = "no decided pair has two different gold scores"
    return metrics


def _say_what_is_left_out(stage: Stage, left_out: Mapping[str, Any]) -> None:
    config = stage.params.label
    if few := left_out["pairs_below_min_votes"]:
        warn(stage, f"{few} pairs have fewer than label.min_votes {config.min_votes} votes; they are left out")
    for kind, count in left_out["passed_over"].items() if config.source == "file" else ():
        warn(stage, f"{count} rows of data.{kind} label nothing: there are votes on their criterion, which go first")


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


def simulated(stage: Stage) -> Iterator[Ballot]:
    """Simulated annotators on all pairs of different responses to each prompt (a `LabelSource`)."""
    seeds = stage.rng()

    def rng(purpose: str) -> random.Random:
        return random.Random(seeds.integer(purpose))  # noqa: S311 (simulation, nothing is kept secret)

    yield from simulated_ballots(_generated_pairs(rng), rng)


SOURCES: Mapping[str, LabelSource] = {"file": from_file, "simulated": simulated}


def _generated_pairs(rng: AddressedRandom) -> Iterator[Pair]:
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for row in read_table(paths.GENERATE / "responses.parquet"):
        by_prompt.setdefault(row["prompt_id"], []).append(row)
    for prompt_id, rows in by_prompt.items():
        first = rows[0]
        responses = [row["response"] for row in rows]
        yield from make_pairs(prompt_id, first["prompt"], first["task"], first["split"], responses, rng)


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
