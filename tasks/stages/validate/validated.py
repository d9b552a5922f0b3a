"""The tables that validation hands on, made of good records; each row gets its side.

What no file gives is derived from others (`tasks.stages.validate.derived`).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from rlhf_core.data.cleaning.splits import SplitRule
from rlhf_core.data.reading.judgements import pair_names, texts_of
from rlhf_core.data.reading.kinds import OVERALL
from rlhf_core.data.reading.records import Record
from rlhf_core.errors import DataError
from rlhf_core.text.identity import content_id, prompt_id, prompt_identity
from rlhf_core.text.normal import visible
from tasks.stages.validate.derived import Records, best_replies, derived_prompts
from tasks.tables import SCHEMAS, write_table

Row = Mapping[str, Any]


def write_tables(folder: Path, records: Records, split: SplitRule, replies: Set[str]) -> dict[str, int]:
    """Write every table of the stage below `folder`, and return how many rows each has.

    Args:
        folder: where to write.
        records: good rows.
        split: which prompts are held out.
        replies: identities of held-out replies to short prompts.

    Raises:
        DataError: there is no training demonstration, no training prompt or no held-out prompt.
    """
    train_prompts, heldout_prompts = _prompts(records, split)
    grades = list(_grades(records.get("graded", ())))
    votes = list(_votes(records.get("votes", ())))
    rows: dict[str, list[dict[str, Any]]] = {
        "demonstrations": list(_demonstrations(records, votes, grades, split)),
        "prompts": train_prompts,
        "heldout_prompts": heldout_prompts,
        "heldout_groups": [{"group": group} for group in sorted(split.groups)],
        "heldout_replies": [{"reply": reply} for reply in sorted(replies)],
        "graded": [_without_criterion(row) for row in grades if row["criterion"] == OVERALL],
        "criteria": [
            _pick(record.values, *SCHEMAS["criteria"].names)
            for record in records.get("graded", ())
            if not _is_overall(record)
        ],
        "ratings": [_rating(record) for record in records.get("graded", ()) if _is_overall(record)],
        "votes": votes,
        "comparisons": [_comparison(record) for record in records.get("comparisons", ())],
        "rankings": [_ranking(record) for record in records.get("rankings", ())],
    }
    for name in rows:
        if "split" in SCHEMAS[name].names:
            rows[name] = [row | {"split": split(row["prompt"])} for row in rows[name]]
    _refuse_nothing_to_do(rows)
    return {name: write_table(folder / f"{name}.parquet", rows[name], SCHEMAS[name]) for name in rows}


def _demonstrations(
    records: Records, votes: Sequence[Row], grades: Sequence[Row], split: SplitRule
) -> Iterator[dict[str, Any]]:
    if "demonstrations" in records:
        for record in records["demonstrations"]:
            given = record.values
            yield _pick(given, "prompt", "response", "task", "source") | {
                "id": given["id"] or content_id("demonstration", given["prompt"], given["response"]),
            }
        return
    seen: set[str] = set()
    for source, values, response in best_replies(records, votes, grades):
        if not visible(response):
            continue  # kept as a reply that people judged; nothing in it to imitate
        identity = content_id("demonstration", values["prompt"], response)
        if split(values["prompt"]) == "train" and identity not in seen:
            seen.add(identity)
            yield {
                "prompt": values["prompt"],
                "task": values.get("task", ""),
                "id": identity,
                "response": response,
                "source": source,
            }


def _prompts(records: Records, split: SplitRule) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the training prompts and of the held-out ones."""
    named = [_prompt(record) for record in records.get("heldout_prompts", ())]
    if "prompts" in records:
        others = [_prompt(record) for record in records["prompts"]]
    else:
        others = [_prompt(record, derived=True) for record in derived_prompts(records)]
    known = {prompt_identity(row["prompt"]) for row in named}
    train = [row for row in others if split(row["prompt"]) == "train"]
    hashed = [
        row for row in others if split(row["prompt"]) == "heldout" and prompt_identity(row["prompt"]) not in known
    ]
    return train, named + hashed


def _prompt(record: Record, *, derived: bool = False) -> dict[str, Any]:
    given = None if derived else record.values["id"]
    prompt = record.values["prompt"]
    return {"id": given or content_id("prompt", prompt), "prompt": prompt, "task": record.values.get("task", "")}


def _is_overall(record: Record) -> bool:
    return bool(record.values["criterion"] == OVERALL)


def _rating(record: Record) -> dict[str, Any]:
    """A grade as it was given, for the label stage; those without an id have none."""
    values = record.values
    return _pick(values, "prompt", "response", "annotator", "score") | {
        "prompt_id": prompt_id(values["prompt"]),
    }


def _grades(records: Iterable[Record]) -> Iterator[dict[str, Any]]:
    """One row a response and criterion, whose score is the mean of all the grades that it got."""
    scores: dict[tuple[str, str, str], list[float]] = {}
    names: dict[tuple[str, str, str], str] = {}
    for record in records:
        values = record.values
        key = values["prompt"], values["response"], values["criterion"]
        scores.setdefault(key, []).append(values["score"])
        if values["id"]:
            names.setdefault(key, values["id"])
    for key, given in scores.items():
        prompt, response, criterion = key
        yield {
            "id": names.get(key) or content_id("graded", *key),
            "prompt": prompt,
            "response": response,
            "criterion": criterion,
            "score": math.fsum(given) / len(given),
        }


def _without_criterion(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "criterion"}


def _votes(records: Iterable[Record]) -> Iterator[dict[str, Any]]:
    """The votes with the identity of their pair: the given one, or one that the same texts have in another row."""
    rows = [record.values for record in records]
    names = pair_names(rows)
    for values in rows:
        texts = texts_of("votes", values)
        identity = values["pair_id"] or names.get(texts) or content_id(prompt_id(texts[0]), *texts[1:])
        yield values | {"pair_id": identity, "prompt_id": prompt_id(values["prompt"])}


def _comparison(record: Record) -> dict[str, Any]:
    values = record.values
    judgement = (values["prompt"], values["chosen"], values["rejected"], values["criterion"])
    return values | {
        "id": values["id"] or content_id("comparison", *judgement),
        "prompt_id": prompt_id(values["prompt"]),
    }


def _ranking(record: Record) -> dict[str, Any]:
    values = record.values
    judged = (values["annotator"], values["criterion"], *map(str, values["ranking"]), *values["responses"])
    return values | {
        "id": values["id"] or content_id("ranking", values["prompt"], *judged),
        "prompt_id": prompt_id(values["prompt"]),
    }


def _pick(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: values[name] for name in names}


def _refuse_nothing_to_do(rows: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
    if not any(row["split"] == "train" for row in rows["demonstrations"]):
        raise DataError(
            "data: no training demonstration. Fix: name demonstrations, or comparisons, rankings, votes or grades of "
            f"several responses on {OVERALL!r} to take them from"
        )
    if not rows["prompts"]:
        raise DataError("data: no training prompt. Fix: name prompts, or lower data.heldout_share")
    if not rows["heldout_prompts"]:
        raise DataError("data: no held-out prompt. Fix: name heldout_prompts, or set data.heldout_share above 0")
