"""Tables between stages: Parquet files of one fixed schema each, read back memory-mapped.

Written the same way twice, a table has the same bytes: columns in the schema's order, fixed encoding and
compression, rows in the order they came, no time or path inside.
"""

import hashlib
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

CACHE = Path(".rlhf/tables")
ROW_GROUP = 8192


def _schema(*required: str | tuple[str, pa.DataType], nullable: tuple[str, ...] = ()) -> pa.Schema:
    """A schema whose plain names are strings; only the columns in `nullable` may hold null."""
    pairs = [(item, pa.string()) if isinstance(item, str) else item for item in required]
    return pa.schema([pa.field(name, kind, nullable=name in nullable) for name, kind in pairs])


_VOTE_COLUMNS = (
    "pair_id",
    "prompt_id",
    "prompt",
    "response_a",
    "response_b",
    "annotator",
    "choice",
    ("strength", pa.int64()),
    ("seconds", pa.float64()),
    "criterion",
    "task",
)
_PREFERENCE_COLUMNS = (
    "pair_id",
    "prompt_id",
    "prompt",
    "task",
    "chosen",
    "rejected",
    ("agreement", pa.float64()),
    ("margin", pa.float64()),
    "source",
)
_PREFERENCES = _schema(*_PREFERENCE_COLUMNS)

SCHEMAS: dict[str, pa.Schema] = {
    "demonstrations": _schema("id", "prompt", "response", "task", "source", "split"),
    "prompts": _schema("id", "prompt", "task"),
    "heldout_prompts": _schema("id", "prompt", "task"),
    "heldout_groups": _schema("group"),
    "heldout_replies": _schema("reply"),
    "graded": _schema("id", "prompt", "response", ("score", pa.float64())),
    "criteria": _schema("prompt", "response", "annotator", "criterion", ("score", pa.float64())),
    "ratings": _schema("prompt_id", "prompt", "response", "annotator", ("score", pa.float64()), "split"),
    "votes": _schema(*_VOTE_COLUMNS, nullable=("seconds",)),
    "comparisons": _schema(
        "id",
        "prompt_id",
        "prompt",
        "chosen",
        "rejected",
        "annotator",
        ("strength", pa.int64()),
        "criterion",
        "task",
        "source",
        "split",
    ),
    "rankings": _schema(
        "id",
        "prompt_id",
        "prompt",
        ("responses", pa.list_(pa.string())),
        ("ranking", pa.list_(pa.int64())),
        "annotator",
        "criterion",
        "task",
        "split",
    ),
    "responses": _schema(
        "prompt_id",
        "prompt",
        "task",
        "split",
        ("sample", pa.int64()),
        "model",
        ("temperature", pa.float64()),
        "response",
        ("response_ids", pa.list_(pa.int64())),
        ("logprobs", pa.list_(pa.float64())),
        ("behaviour_logprobs", pa.list_(pa.float64())),
        ("finished", pa.bool_()),
        ("score", pa.float64()),
        nullable=("score",),
    ),
    "label_votes": _schema(*_VOTE_COLUMNS, "source", "split", nullable=("seconds",)),
    "pairs": _schema(
        "pair_id",
        "prompt_id",
        "prompt",
        "task",
        "split",
        "response_a",
        "response_b",
        "criterion",
        "label",
        ("num_votes", pa.int64()),
        ("agreement", pa.float64()),
        ("margin", pa.float64()),
        "source",
    ),
    "train": _PREFERENCES,
    "heldout": _PREFERENCES,
    "other_pairs": _schema(*_PREFERENCE_COLUMNS, "criterion", ("tie", pa.bool_()), "split"),
    "heldout_scores": _schema(
        "pair_id",
        "prompt_id",
        ("chosen_score", pa.float64()),
        ("rejected_score", pa.float64()),
        ("margin", pa.float64()),
        ("margin_deviation", pa.float64()),
        ("chosen_chars", pa.int64()),
        ("rejected_chars", pa.int64()),
        nullable=("margin_deviation",),
    ),
    "graded_scores": _schema(
        "id",
        "prompt",
        "response",
        ("score", pa.float64()),
        ("model_score", pa.float64()),
        ("deviation", pa.float64()),
        nullable=("deviation",),
    ),
}
"""Every table a stage hands to another one, by name. Names are the file stems, except `label_votes`
(artifacts/label/votes.parquet), which has two columns more than the `votes` that validation writes."""


def write_table(path: Path, rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> int:
    """Write `rows` as Parquet at `path` and return how many there were; the same rows give the same bytes.

    A row must have exactly the columns of `schema`, and null only where the schema allows it; anything
    else is a mistake of the calling stage and raises ValueError before the file gets its name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    count = 0
    try:
        with pq.ParquetWriter(unfinished, schema, compression="zstd", version="2.6") as writer:
            for batch in _batches(rows):
                writer.write_table(_to_arrow(batch, schema, path, first=count))
                count += len(batch)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return count


class Rows:
    """The rows of a Parquet file, read anew each time they are asked for, of which a thousand are in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with pq.ParquetFile(self._path) as parquet:
            for batch in parquet.iter_batches(1024):
                yield from batch.to_pylist()


def read_table(path: Path) -> datasets.Dataset:
    """Open the Parquet file at `path` as a memory-mapped Hugging Face data set.

    The Arrow form that is mapped lies in `.rlhf/tables/` under the working directory, named by the file's
    path and SHA-256; it is made on first use, and a newer version of the same table replaces it.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    slug = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    mapped = CACHE / f"{path.stem}-{slug}-{digest[:24]}" / "table.arrow"
    if not mapped.exists():
        _make_arrow(path, mapped)
        _drop_older(mapped.parent, f"{path.stem}-{slug}-")
    return datasets.Dataset.from_file(str(mapped))


def _batches(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    source = iter(rows)
    while batch := list(islice(source, ROW_GROUP)):
        yield batch


def _to_arrow(batch: list[Mapping[str, Any]], schema: pa.Schema, path: Path, first: int) -> pa.Table:
    names = set(schema.names)
    for number, row in enumerate(batch, start=first):
        if row.keys() != names:
            missing, extra = sorted(names - row.keys()), sorted(row.keys() - names)
            raise ValueError(f"{path}: row {number}: missing columns {missing}, unknown columns {extra}")
        if empty := [field.name for field in schema if row[field.name] is None and not field.nullable]:
            raise ValueError(f"{path}: row {number}: null in {empty}")
    columns = {field.name: [row[field.name] for row in batch] for field in schema}
    return pa.table({name: pa.array(columns[name], type=schema.field(name).type) for name in columns}, schema=schema)


def _make_arrow(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(f".{secrets.token_hex(4)}.tmp")  # the processes of a stage all begin with this
    with pq.ParquetFile(source) as parquet, pa.OSFile(str(unfinished), "wb") as sink:
        # `datasets` knows nullable columns only, and cannot open a stream without a batch.
        schema = pa.schema([field.with_nullable(True) for field in parquet.schema_arrow])
        with pa.ipc.new_stream(sink, schema) as writer:
            writer.write_batch(pa.record_batch([[]] * len(schema), schema=schema))
            for batch in parquet.iter_batches(ROW_GROUP):
                writer.write_table(pa.table(batch.columns, schema=schema))
    unfinished.replace(target)


def _drop_older(kept: Path, prefix: str) -> None:
    """Remove the mapped forms of earlier versions; a process that still maps one keeps its pages (POSIX)."""
    for folder in CACHE.glob(f"{prefix}*"):
        if folder != kept:
            shutil.rmtree(folder, ignore_errors=True)  # another process may be at it too
