"""The tables that validation hands on, made of good records: splits are decided and missing kinds are derived here.

Where no file names them, demonstrations are the chosen responses of the training comparisons and the best ones of the
training rankings, each on the whole; prompts and held-out prompts are those of the comparisons and rankings, else of
the votes, else of the demonstrations.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_core.data.identity import prompt_group, prompt_identity
from rlhf_core.data.judgements import pair_names, texts_of
from rlhf_core.data.kinds import OVERALL, Kind
from rlhf_core.data.normal import visible
from rlhf_core.data.records import Record, content_id, prompt_id
from rlhf_core.data.splits import Split, split_of
from rlhf_core.errors import DataError
from tasks.tables import SCHEMAS, write_table

Records = Mapping[Kind, Sequence[Record]]
SplitRule = Callable[[str], Split]


def write_tables(folder: Path, records: Records, heldout_share: float) -> dict[str, int]:
    """Write every table of the stage below `folder`, and return how many rows each has.

    Raises:
        DataError: there is no training demonstration, no training prompt or no held-out prompt.
    """
    groups = {prompt_group(record.values["prompt"]) for record in records.get("heldout_prompts", ())}

    def split(prompt: str) -> Split:
        return split_of(prompt, groups, heldout_share)

    train_prompts, heldout_prompts = _prompts(records, split)
    grades = list(_grades(records.get("graded", ())))
    rows: dict[str, list[dict[str, Any]]] = {
        "demonstrations": list(_demonstrations(records, split)),
        "prompts": train_prompts,
        "heldout_prompts": heldout_prompts,
        "graded": [_without_criterion(row) for row in grades if row["criterion"] == OVERALL],
        "criteria": [row for row in grades if row["criterion"] != OVERALL],
        "votes": list(_votes(records.get("votes", ()))),
        "comparisons": [_comparison(record, split) for record in records.get("comparisons", ())],
        "rankings": [_ranking(record, split) for record in records.get("rankings", ())],
    }
    _refuse_nothing_to_do(rows)
    return {name: write_table(folder / f"{name}.parquet", rows[name], SCHEMAS[name]) for name in rows}


def _demonstrations(records: Records, split: SplitRule) -> Iterator[dict[str, Any]]:
    if "demonstrations" in records:
        for record in records["demonstrations"]:
            values = record.values
            yield _pick(values, "prompt", "response", "task", "source") | {
                "id": values["id"] or content_id("demonstration", values["prompt"], values["response"]),
                "split": split(values["prompt"]),
            }
        return
    seen: set[str] = set()
    for source, record, response in _preferred(records):
        values = record.values
        if not visible(response):
            continue  # kept as a reply that people judged; nothing in it to imitate
        identity = content_id("demonstration", values["prompt"], response)
        if split(values["prompt"]) == "train" and identity not in seen:
            seen.add(identity)
            yield _pick(values, "prompt", "task") | {
                "id": identity,
                "response": response,
                "source": source,
                "split": "train",
            }


def _preferred(records: Records) -> Iterator[tuple[Kind, Record, str]]:
    """The responses that people found best on the whole; a ranking in which all are equal names none."""
    for record in filter(_is_overall, records.get("comparisons", ())):
        yield "comparisons", record, record.values["chosen"]
    for record in filter(_is_overall, records.get("rankings", ())):
        ranking = record.values["ranking"]
        for response, rank in zip(record.values["responses"], ranking, strict=True):
            if rank == min(ranking) < max(ranking):
                yield "rankings", record, response


def _prompts(records: Records, split: SplitRule) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the training prompts and of the held-out ones."""
    named = [_prompt(record) for record in records.get("heldout_prompts", ())]
    if "prompts" in records:
        others = [_prompt(record) for record in records["prompts"]]
    else:
        others = list(_derived_prompts(records))
    known = {prompt_identity(row["prompt"]) for row in named}
    train = [row for row in others if split(row["prompt"]) == "train"]
    hashed = [
        row for row in others if split(row["prompt"]) == "heldout" and prompt_identity(row["prompt"]) not in known
    ]
    return train, named + hashed


def _derived_prompts(records: Records) -> Iterator[dict[str, Any]]:
    """Each prompt once, in its first form, of the kind that says most about what is to be labelled."""
    sources: tuple[tuple[Kind, ...], ...] = (("comparisons", "rankings"), ("votes",), ("demonstrations",))
    kinds = next((some for some in sources if any(kind in records for kind in some)), ())
    known: set[str] = set()
    for record in (record for kind in kinds for record in records.get(kind, ())):
        identity = prompt_identity(record.values["prompt"])
        if identity not in known:
            known.add(identity)
            yield _prompt(record, derived=True)


def _prompt(record: Record, *, derived: bool = False) -> dict[str, Any]:
    given = None if derived else record.values["id"]
    prompt = record.values["prompt"]
    return {"id": given or content_id("prompt", prompt), "prompt": prompt, "task": record.values["task"]}


def _is_overall(record: Record) -> bool:
    return bool(record.values["criterion"] == OVERALL)


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


def _comparison(record: Record, split: SplitRule) -> dict[str, Any]:
    values = record.values
    judgement = (values["prompt"], values["chosen"], values["rejected"], values["criterion"])
    return values | {
        "id": values["id"] or content_id("comparison", *judgement),
        "prompt_id": prompt_id(values["prompt"]),
        "split": split(values["prompt"]),
    }


def _ranking(record: Record, split: SplitRule) -> dict[str, Any]:
    values = record.values
    judged = (values["annotator"], values["criterion"], *map(str, values["ranking"]), *values["responses"])
    return values | {
        "id": values["id"] or content_id("ranking", values["prompt"], *judged),
        "prompt_id": prompt_id(values["prompt"]),
        "split": split(values["prompt"]),
    }


def _pick(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: values[name] for name in names}


def _refuse_nothing_to_do(rows: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
    if not any(row["split"] == "train" for row in rows["demonstrations"]):
        raise DataError(
            "data: no training demonstration. Fix: name demonstrations, or comparisons or rankings "
            f"on {OVERALL!r} to take them from"
        )
    if not rows["prompts"]:
        raise DataError("data: no training prompt. Fix: name prompts, or lower data.heldout_share")
    if not rows["heldout_prompts"]:
        raise DataError("data: no held-out prompt. Fix: name heldout_prompts, or set data.heldout_share above 0")
