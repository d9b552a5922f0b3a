"""Rows of a data set from a hub, read by `datasets` at one commit, and held against the kind that they are to be.

`datasets` runs no code of a repository. A file appears whole or not at all, with a note beside it of where its rows
came from.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_core.data.reading.kinds import Kind
from rlhf_core.data.reading.readers import read_rows
from rlhf_core.data.reading.records import fault_of
from rlhf_core.errors import ConfigError, DataError
from tasks.fetching.hub import answering
from tasks.fetching.source import Source
from tasks.lineage.provenance import UNKNOWN

os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

FORMATS = (".parquet", ".jsonl", ".jsonl.gz")


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetCommit:
    """One commit of a data set's repository.

    Attributes:
        source: what was asked for.
        commit: what its revision stands for now.
        licence: as the repository's card names it.
    """

    source: Source
    commit: str
    licence: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """How the rows of a file fit a kind.

    Attributes:
        rows: all of them.
        usable: those with every field that the kind needs, and no field of it in a wrong type.
        problems: of the others, how many have which problem, the most frequent first.
    """

    rows: int
    usable: int
    problems: Mapping[str, int]


def look_up(source: Source) -> DatasetCommit:
    """Ask the hub which commit a revision stands for, and for the licence.

    Raises:
        ConfigError: there is no such data set or revision, or it may not be read.
        EnvironmentProblem: the hub does not answer.
    """
    from huggingface_hub import HfApi

    with answering(source):
        revision = HfApi().resolve_revision(source.name, revision=source.revision, repo_type="dataset")
        info = HfApi().dataset_info(source.name, revision=revision.resolved)
    licence = info.card_data.get("license") if info.card_data else None
    return DatasetCommit(source=source, commit=revision.resolved, licence=str(licence or UNKNOWN))


def write_rows(found: DatasetCommit, split: str, config: str | None, file: Path) -> None:
    """Write the rows of one split into `file`, in its format.

    Raises:
        ConfigError: there is no such split or configuration, or the repository cannot be read without its code.
        EnvironmentProblem: the hub does not answer any more.
    """
    import datasets

    with answering(found.source), _readable(found.source):
        rows = datasets.load_dataset(found.source.name, config, split=split, revision=found.commit)
    if file.name.endswith(".parquet"):
        rows.to_parquet(file)
    else:
        rows.to_json(file, compression="gzip" if file.name.endswith(".gz") else None)


def check_file(file: Path) -> None:
    """Refuse a name that no rows can be written to.

    Raises:
        ConfigError: another format, or a file that is there.
    """
    if not file.name.lower().endswith(FORMATS):
        raise ConfigError(f"{file}: no format that rows are written in. Fix: a name that ends in {', '.join(FORMATS)}")
    if file.exists():
        raise ConfigError(f"{file}: is there already. Fix: another name, or remove it")


def fit(file: Path, kind: Kind) -> Fit:
    """Hold every row against the form of a kind: what `validate` would say of it before its checks.

    Raises:
        DataError: no row is usable; the most frequent problem is named.
    """
    problems: Counter[str] = Counter()
    rows = usable = 0
    for row in read_rows(file):
        rows += 1
        why = fault_of(kind, row)
        usable += not why
        problems.update([why] if why else [])
    if not usable:
        first = f": {problems.most_common(1)[0][0]}" if problems else ""
        raise DataError(
            f"{file.name}: none of {rows} rows is of kind {kind}{first}. Fix: another --kind, --split or --config"
        )
    return Fit(rows=rows, usable=usable, problems=dict(problems.most_common()))


@contextmanager
def _readable(source: Source) -> Iterator[None]:
    """Turn what `datasets` raises of a repository into one line."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, ValueError, RuntimeError) as error:  # of a wrong split or configuration it raises ValueError
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{source}: {line}. Fix: --split, --config, or another repository") from error


def as_note(found: DatasetCommit, split: str, config: str | None, kind: Kind, fitting: Fit) -> dict[str, Any]:
    """What the note says beside source, commit and licence."""
    return {"split": split, "config": config, "kind": kind, "rows": fitting.rows, "usable": fitting.usable}
