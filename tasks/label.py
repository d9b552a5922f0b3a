"""Stage `label`: votes on pairs of responses, and the label that each pair gets from them."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from rlhf_core.data.splits import prompt_group, split_of
from rlhf_core.errors import DataError
from rlhf_core.feedback.annotators import gold_agreement, simulated_ballots
from rlhf_core.feedback.labelling import (
    AddressedRandom,
    Ballot,
    Pair,
    Verdict,
    Vote,
    aggregate,
    annotator_table,
    make_pairs,
    pair_id,
    summary,
)
from rlhf_core.state.atomic import write_json
from tasks import paths
from tasks.stage import Stage
from tasks.tables import SCHEMAS, read_table, write_table

FILE_ANNOTATOR = "file"  # who voted where a file only says which response was chosen


class LabelSource(Protocol):
    """Where votes come from: reads what the stage may read and yields each pair once, with all its votes."""

    def __call__(self, stage: Stage) -> Iterable[Ballot]: ...


def run(stage: Stage) -> dict[str, Any]:
    """Collect votes from the source, write `votes.parquet`, `pairs.parquet` and `annotators.json`.

    Raises:
        DataError: the source has no pair with enough votes.
    """
    config = stage.params.label
    ballots = [ballot for ballot in SOURCES[config.source](stage) if len(ballot.votes) >= config.min_votes]
    if not ballots:
        raise DataError(
            f"label.source: '{config.source}' gave no pair with {config.min_votes} or more votes. "
            "Fix: name votes or comparisons under data, choose another source, or lower label.min_votes"
        )
    verdicts = [aggregate(ballot.votes) for ballot in ballots]
    write_table(stage.out / "votes.parquet", _vote_rows(ballots, config.source), SCHEMAS["label_votes"])
    write_table(stage.out / "pairs.parquet", _pair_rows(ballots, verdicts, config.source), SCHEMAS["pairs"])
    write_json(stage.out / "annotators.json", {"source": config.source, "annotators": annotator_table(ballots)})
    metrics = summary(ballots, verdicts)
    if config.source == "simulated":
        metrics["majority_agrees_with_gold"] = gold_agreement(ballots, verdicts)
    return metrics


def simulated(stage: Stage) -> Iterator[Ballot]:
    """Simulated annotators on all pairs of different responses to each prompt (a `LabelSource`)."""
    seeds = stage.rng()

    def rng(purpose: str) -> random.Random:
        return random.Random(seeds.integer(purpose))  # noqa: S311 (simulation, nothing is kept secret)

    yield from simulated_ballots(_generated_pairs(rng), rng)


def from_file(stage: Stage) -> Iterator[Ballot]:
    """The votes of the data files or, where there are none, their comparisons (a `LabelSource`)."""
    votes = read_table(paths.VALIDATE / "votes.parquet")
    if len(votes):
        return _voted(votes, _split_rule(stage))
    return _compared(read_table(paths.VALIDATE / "comparisons.parquet"))


SOURCES: Mapping[str, LabelSource] = {"file": from_file, "simulated": simulated}


def _generated_pairs(rng: AddressedRandom) -> Iterator[Pair]:
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for row in read_table(paths.GENERATE / "responses.parquet"):
        by_prompt.setdefault(row["prompt_id"], []).append(row)
    for prompt_id, rows in by_prompt.items():
        first = rows[0]
        responses = [row["response"] for row in rows]
        yield from make_pairs(prompt_id, first["prompt"], first["task"], first["split"], responses, rng)


def _split_rule(stage: Stage) -> Callable[[str], str]:
    heldout = read_table(paths.VALIDATE / "heldout_prompts.parquet")
    groups = {prompt_group(row["prompt"]) for row in heldout}
    return lambda prompt: split_of(prompt, groups, stage.params.data.heldout_share)


def _voted(rows: Iterable[Mapping[str, Any]], split: Callable[[str], str]) -> Iterator[Ballot]:
    """Group vote rows by pair; an annotator's last vote on a pair is the one that counts."""
    pairs: dict[str, Pair] = {}
    votes: dict[str, dict[str, Vote]] = {}
    for row in rows:
        key = row["pair_id"]
        if key not in pairs:
            pairs[key] = _pair(row, row["response_a"], row["response_b"], key, split(row["prompt"]))
        vote = _as_shown(pairs[key], row)
        votes.setdefault(key, {})[vote.annotator] = vote
    for key, pair in pairs.items():
        yield Ballot(pair=pair, votes=tuple(votes[key].values()))


def _as_shown(pair: Pair, row: Mapping[str, Any]) -> Vote:
    """A row's vote in the order of `pair`: people may have been shown the two responses the other way round."""
    vote = Vote(annotator=row["annotator"], choice=row["choice"], strength=row["strength"], seconds=row["seconds"])
    shown = (row["prompt"], row["response_a"], row["response_b"])
    if shown == (pair.prompt, pair.response_a, pair.response_b):
        return vote
    if shown == (pair.prompt, pair.response_b, pair.response_a):
        return Vote.from_signed(vote.annotator, -vote.signed, seconds=vote.seconds)
    raise DataError(
        f"votes: pair_id: {pair.pair_id!r} stands for two different pairs of responses. "
        "Fix: give each pair an id of its own, or leave the column out"
    )


def _compared(rows: Iterable[Mapping[str, Any]]) -> Iterator[Ballot]:
    """One vote for the chosen response a row; rows on the same pair, even contradictory ones, are one ballot."""
    pairs: dict[str, Pair] = {}
    votes: dict[str, list[Vote]] = {}
    for row in rows:
        key = pair_id(row["prompt_id"], row["chosen"], row["rejected"])
        pair = pairs.setdefault(key, _pair(row, row["chosen"], row["rejected"], key, row["split"]))
        chosen_first = pair.response_a == row["chosen"]
        votes.setdefault(key, []).append(Vote(annotator=FILE_ANNOTATOR, choice="a" if chosen_first else "b"))
    for key, pair in pairs.items():
        yield Ballot(pair=pair, votes=tuple(votes[key]))


def _pair(row: Mapping[str, Any], response_a: str, response_b: str, identity: str, split: str) -> Pair:
    return Pair(
        pair_id=identity,
        prompt_id=row["prompt_id"],
        prompt=row["prompt"],
        task=row["task"],
        split=split,
        response_a=response_a,
        response_b=response_b,
    )


def _vote_rows(ballots: Iterable[Ballot], source: str) -> Iterator[dict[str, Any]]:
    for ballot in ballots:
        for vote in ballot.votes:
            yield asdict(ballot.pair) | asdict(vote) | {"source": source}


def _pair_rows(ballots: Sequence[Ballot], verdicts: Sequence[Verdict], source: str) -> Iterator[dict[str, Any]]:
    for ballot, verdict in zip(ballots, verdicts, strict=True):
        yield asdict(ballot.pair) | asdict(verdict) | {"num_votes": len(ballot.votes), "source": source}
