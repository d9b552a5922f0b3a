"""What an export is tried on: the held-out prompts of the run that made the version, the very bytes, by its lineage.

They are outputs of stages before it. `dvc.lock` has DVC's hash of each and the manifest its SHA-256, so they are found
in the checkout or a run's worktree where they still stand, and else in DVC's cache.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from rlhf_core.data.reading.readers import Refused, read_rows
from rlhf_core.errors import ConfigError, DataError, EnvironmentProblem
from rlhf_core.state.atomic import file_digest
from tasks import paths
from tasks.exporting.subject import Subject
from tasks.lineage.cached import cached

PROMPTS = 200
TRIED = {
    "policy": ("validate", paths.VALIDATE / "heldout_prompts.parquet"),
    "reward": ("preferences", paths.PREFERENCES / "heldout.parquet"),
}

Pair = tuple[str, str]


def texts_to_try(subject: Subject, given: Path | None) -> list[Pair]:
    """At most 200 prompts, each with a response for a reward model (for a policy it is empty), in their order.

    Args:
        subject: the version.
        given: a file of rows with `prompt` (and `response`, or `chosen` and `rejected`) in the place of the run's own.

    Raises:
        EnvironmentProblem: the run's own are gone.
        ConfigError, DataError: the given file cannot be read, or there is not one row of use.
    """
    source = given or lineage_file(subject, *TRIED[subject.kind])
    rows = _given_rows(given) if given else pq.read_table(source).to_pylist()
    pairs = dict.fromkeys(pair for row in rows for pair in _pairs(row, subject.kind == "reward"))
    if not pairs:
        raise DataError(f"{source}: nothing to try the export on. Fix: --prompts FILE with rows that have `prompt`")
    return list(pairs)[:PROMPTS]


def lineage_file(subject: Subject, stage: str, path: Path) -> Path:
    """An output of a stage that a version was made from.

    Raises:
        EnvironmentProblem: neither a checkout nor DVC's cache has those bytes any more.
    """
    wanted = subject.manifest["outputs"].get(stage, {}).get(path.as_posix())
    if wanted is not None:
        for place in _places(subject, stage, path):
            if place.is_file() and file_digest(place) == wanted:
                return place
    raise EnvironmentProblem(
        f"{subject.reference}: {path} of its run, which the export is tried on, is in no checkout and not in DVC's "
        "cache. Fix: --prompts FILE with rows that have `prompt`"
    )


def _places(subject: Subject, stage: str, path: Path) -> Iterator[Path]:
    yield subject.home / path
    yield from (run / path for run in sorted((subject.home / paths.RUNS).glob("*")))
    yield from cached(subject.home, subject.manifest["dvc_lock"], stage, path)


def _given_rows(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        raise ConfigError(f"{file}: there is no such file. Fix: --prompts with a file of rows that have `prompt`")
    return [row.value for row in read_rows(file) if not isinstance(row, Refused) and isinstance(row.value, dict)]


def _pairs(row: dict[str, Any], scored: bool) -> Iterator[Pair]:
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        return
    if not scored:
        yield prompt, ""
        return
    for column in ("response", "chosen", "rejected"):
        if isinstance(row.get(column), str):
            yield prompt, row[column]
