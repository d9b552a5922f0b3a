"""The rows of `responses.parquet` and `comparisons.parquet`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from rlhf_core.evaluation.judge_registry import JUDGES, Compared, PointwiseJudge, compared_numbers
from rlhf_core.evaluation.judged_set import JudgedSet
from rlhf_core.evaluation.verdict import SFT
from rlhf_core.text.identity import prompt_id

_TEXT, _NUMBER = pa.string(), pa.float64()
COMPARISONS = pa.schema(
    [
        pa.field("model", _TEXT, nullable=False),
        pa.field("temperature", _NUMBER, nullable=False),
        pa.field("judge", _TEXT, nullable=False),
        pa.field("prompt_id", _TEXT, nullable=False),
        pa.field("score", _NUMBER, nullable=False),
        pa.field("sft_score", _NUMBER, nullable=False),
        pa.field("outcome", _TEXT, nullable=False),
    ]
)


def responses_schema(asked: Sequence[str]) -> pa.Schema:
    """Columns of `responses.parquet`: what was written, and of each pointwise judge its score, null if unasked.

    A judge that reads a folder of its own has a column only where it is among those `asked`.
    """
    return pa.schema(
        [
            pa.field("model", _TEXT, nullable=False),
            pa.field("temperature", _NUMBER, nullable=False),
            pa.field("prompt_id", _TEXT, nullable=False),
            pa.field("prompt", _TEXT, nullable=False),
            pa.field("response", _TEXT, nullable=False),
            pa.field("num_tokens", pa.int64(), nullable=False),
            pa.field("finished", pa.bool_(), nullable=False),
            *(pa.field(column, _NUMBER) for name, judge in _pointwise(asked) for column in (name, *judge.details)),
        ]
    )


def response_rows(
    prompts: Sequence[str], judged: Mapping[tuple[str, float], JudgedSet], asked: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Every response of every model."""
    for (name, temperature), one in judged.items():
        for row, prompt in enumerate(prompts):
            yield {
                "model": name,
                "temperature": temperature,
                "prompt_id": prompt_id(prompt),
                "prompt": prompt,
                "response": one.responses.texts[row],
                "num_tokens": len(one.responses.response_ids[row]),
                "finished": one.responses.finished[row],
                **_scores(one, row, asked),
            }


def comparison_rows(
    prompts: Sequence[str], judged: Mapping[tuple[str, float], JudgedSet], compared: Compared
) -> Iterator[dict[str, Any]]:
    """Every comparison of a candidate with the SFT model."""
    for (name, baseline, temperature, judge), verdicts in compared.items():
        if baseline != SFT:
            continue
        ours, theirs = compared_numbers(judge, judged[name, temperature], judged[SFT, temperature], verdicts)
        for row, prompt in enumerate(prompts):
            yield {
                "model": name,
                "temperature": temperature,
                "judge": judge,
                "prompt_id": prompt_id(prompt),
                "score": ours[row],
                "sft_score": theirs[row],
                "outcome": verdicts.outcomes[row],
            }


def _scores(one: JudgedSet, row: int, asked: Sequence[str]) -> dict[str, float | None]:
    scores: dict[str, float | None] = {}
    for name, judge in _pointwise(asked):
        gave = name in one.scores
        scores[name] = one.scores[name][row] if gave else None
        scores |= {detail: getattr(one.grades[row], detail) if gave else None for detail in judge.details}
    return scores


def _pointwise(asked: Sequence[str]) -> list[tuple[str, PointwiseJudge]]:
    pointwise = [(name, judge) for name, judge in JUDGES.items() if isinstance(judge, PointwiseJudge)]
    return [(name, judge) for name, judge in pointwise if name in asked or not judge.row.reads_folder]
