"""The label sources: how each is asked for votes. Their rows (`rlhf_core.config.data.SOURCE_ROWS`) say the rest."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_core.config.data import SOURCE_ROWS, SourceName, SourceRow
from rlhf_core.demo.annotators import gold_agreement, simulated_ballots
from rlhf_core.feedback.ballots import AddressedRandom, Ballot, Majority, Pair
from rlhf_core.feedback.labelling import make_pairs
from tasks import paths
from tasks.frame.stage import Stage
from tasks.stages.label.files import JUDGEMENTS, from_file
from tasks.tables import read_table

Figures = tuple[dict[str, Any], dict[str, str]]


def no_figures(ballots: Sequence[Ballot], verdicts: Sequence[Majority]) -> Figures:
    """Nothing beyond what is said of every source."""
    return {}, {}


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelSource:
    """Where votes come from.

    Attributes:
        row: what is known without asking.
        ballots: reads what the stage may read and yields each pair once, with all its votes.
        reads: kinds of the data files that it labels from; rows of other kinds are counted as passed over.
        figures: from ballots and their verdicts, figures of its own and why some are None.
    """

    row: SourceRow
    ballots: Callable[[Stage], Iterable[Ballot]]
    reads: tuple[str, ...] = ()
    figures: Callable[[Sequence[Ballot], Sequence[Majority]], Figures] = no_figures


def simulated(stage: Stage) -> Iterator[Ballot]:
    """Simulated annotators on all pairs of different responses to each prompt."""
    seeds = stage.rng()

    def rng(purpose: str) -> random.Random:
        return random.Random(seeds.integer(purpose))  # noqa: S311 (simulation, nothing is kept secret)

    yield from simulated_ballots(generated_pairs(rng), rng)


def generated_pairs(rng: AddressedRandom) -> Iterator[Pair]:
    """All pairs of different responses of the stage `generate`, those to one prompt one after the other."""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for row in read_table(paths.GENERATE / "responses.parquet"):
        by_prompt.setdefault(row["prompt_id"], []).append(row)
    for prompt_id, rows in by_prompt.items():
        first = rows[0]
        responses = [row["response"] for row in rows]
        yield from make_pairs(prompt_id, first["prompt"], first["task"], first["split"], responses, rng)


def agreement_with_gold(ballots: Sequence[Ballot], verdicts: Sequence[Majority]) -> Figures:
    """How often the majority of simulated annotators is right."""
    agrees = gold_agreement(ballots, verdicts)
    why = {"majority_agrees_with_gold": "no decided pair has two different gold scores"}
    return {"majority_agrees_with_gold": agrees}, why if agrees is None else {}


SOURCES: Mapping[SourceName, LabelSource] = {
    "file": LabelSource(row=SOURCE_ROWS["file"], ballots=from_file, reads=(*JUDGEMENTS, "ratings")),
    "simulated": LabelSource(row=SOURCE_ROWS["simulated"], ballots=simulated, figures=agreement_with_gold),
}
