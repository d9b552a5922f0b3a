"""Stage `regressions`: what a policy lost against the SFT model that no judge of the comparison speaks of.

It reads the responses of `evaluate`, at each temperature by itself: whether a policy repeats itself, says fewer
different things, or gives back replies that it was trained on. A judge may like all three.

Reads artifacts/evaluate/responses.parquet and what the policies learned from: artifacts/validate/demonstrations.parquet
(its training half) and artifacts/preferences/train.parquet. Writes copies.parquet, the replies that are copies.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from rlhf_core.errors import DataError
from rlhf_core.evaluation.intervals import bounds, mean_interval, too_few
from rlhf_core.evaluation.refusals import share_gain
from rlhf_core.evaluation.text import repeated_share, word_ngrams
from rlhf_core.text.normal import normal_form
from tasks import paths
from tasks.frame.stage import Stage
from tasks.tables import read_table, write_table

BASE = "sft"
REPEATED_NGRAM = 4
COPIED_WORDS = 8
"""A reply of fewer words is nobody's own: "Yes, that is right." may stand anywhere."""

COPIES = pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("model", "prompt_id", "response")])
Rows = list[dict[str, Any]]


def run(stage: Stage) -> dict[str, Any]:
    """Measure every model; returns the figures of `reports/metrics/regressions.json`.

    Raises:
        DataError: the models have not answered the same prompts.
    """
    learned, confidence = _learned_replies(stage), stage.params.evaluate.confidence
    sets = _response_sets(stage)
    flags = {key: [is_copy(row["response"], learned) for row in rows] for key, rows in sets.items()}
    metrics: dict[str, Any] = {}
    worse: list[str] = []
    for (model, label), rows in sets.items():
        own = [row["response"] for row in rows]
        figures: dict[str, Any] = variety(own) | {"copied_share": float(np.mean(flags[model, label]))}
        if model != BASE:
            base = [row["response"] for row in sets[BASE, label]]
            figures |= losses(own, base, flags[model, label], flags[BASE, label], confidence)
            worse += [f"{model}.{label}.{name}" for name in figures["worse"]]
        metrics.setdefault(model, {})[label] = figures
    copies = (
        {"model": model, "prompt_id": row["prompt_id"], "response": row["response"]}
        for (model, label), rows in sets.items()
        for row, copied in zip(rows, flags[model, label], strict=True)
        if copied
    )
    write_table(stage.out / "copies.parquet", copies, COPIES)
    return {"num_worse": len(worse), "num_learned_replies": len(learned), **metrics}


def variety(texts: Sequence[str]) -> dict[str, Any]:
    """How varied a model's responses are, words in any case.

    Returns:
        `distinct_1` and `distinct_2`: different word n-grams over all of them, of all responses together (Li et al.
        2016, "A Diversity-Promoting Objective Function"), None without any; `repetition_4`: mean over responses of the
        share of word 4-grams that stood in the same response before (seq-rep-4, Welleck et al. 2020, "Neural Text
        Generation with Unlikelihood Training").
    """
    found: dict[str, Any] = {}
    for size in (1, 2):
        grams = list(chain.from_iterable(word_ngrams(text, size) for text in texts))
        found[f"distinct_{size}"] = len(set(grams)) / len(grams) if grams else None
    return found | {"repetition_4": float(np.mean([repeated_share(text, REPEATED_NGRAM) for text in texts]))}


def losses(
    own: Sequence[str], base: Sequence[str], copied: Sequence[bool], base_copied: Sequence[bool], confidence: float
) -> dict[str, Any]:
    """What a policy does more than the SFT model on the same prompts, each with bounds over prompts.

    Returns:
        `repetition_4_gain`, `copied_share_gain`; and `worse`, the names of those whose whole interval lies above 0.
        Without bounds, on fewer prompts than make an interval, nothing is said to be worse and `undefined` says why.
    """
    repeated = [
        repeated_share(text, REPEATED_NGRAM) - repeated_share(other, REPEATED_NGRAM)
        for text, other in zip(own, base, strict=True)
    ]
    found: dict[str, Any] = {
        "repetition_4_gain": float(np.mean(repeated)),
        **bounds("repetition_4_gain", mean_interval(repeated, confidence)),
        **share_gain("copied_share_gain", copied, base_copied, confidence),
    }
    gains = ("repetition_4_gain", "copied_share_gain")
    found["worse"] = [name for name in gains if (found[f"{name}_low"] or 0.0) > 0.0]
    why = too_few(len(own))
    return found | ({"undefined": {f"{name}_low": why for name in gains}} if why else {})


def is_copy(text: str, learned: frozenset[str]) -> bool:
    """Whether a reply of at least `COPIED_WORDS` words is one of those learned, in normal form."""
    plain = normal_form(text)
    return plain in learned and len(plain.split()) >= COPIED_WORDS


def _response_sets(stage: Stage) -> Mapping[tuple[str, str], Rows]:
    """Responses by model and temperature (`T=1`), in the order of the table, which is that of the prompts."""
    path = paths.EVALUATE / "responses.parquet"
    found: dict[tuple[str, str], Rows] = {}
    columns = ["model", "temperature", "prompt_id", "response"]
    for row in read_table(stage.root / path).select_columns(columns):
        found.setdefault((row["model"], f"T={row['temperature']:g}"), []).append(row)
    for (model, label), rows in found.items():
        if [row["prompt_id"] for row in rows] != [row["prompt_id"] for row in found.get((BASE, label), [])]:
            raise DataError(
                f"{path}: {model} at {label} and {BASE} have not answered the same prompts. Fix: run evaluate"
            )
    return found


def _learned_replies(stage: Stage) -> frozenset[str]:
    """Normal forms of the replies that SFT and preference pairs train on."""

    def replies() -> Iterator[str]:
        for row in read_table(stage.root / paths.VALIDATE / "demonstrations.parquet"):
            if row["split"] == "train":
                yield row["response"]
        for row in read_table(stage.root / paths.PREFERENCES / "train.parquet"):
            yield from (row["chosen"], row["rejected"])

    return frozenset(map(normal_form, replies()))
