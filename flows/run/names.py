"""Names of runs that say what was run: profile, data, date; and the tags by which the Prefect UI sorts them."""

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flows.run.request import RunRequest

LONGEST_NAME = 64
LONGEST_STEM = 36
TAG_KINDS = ("profile:", "data:")
STRANGE = re.compile(r"[^a-z0-9._-]+")
SUFFIXES = re.compile(r"\.(jsonl|ndjson|json|csv|parquet|gz)\b")


def run_name(request: "RunRequest", when: float, of: str = "") -> str:
    """Such as `hh-harmless-pairs-20261128-030000`: profile, data files, and local time.

    Args:
        request: what is run; a name of its own stands for profile and data.
        when: seconds since 1970.
        of: id of the Prefect run, whose last digits make the name its own.
    """
    stem = request.name or "-".join([request.profile or "run", *_data_names(request)])
    digits = f"-{of.replace('-', '')[-8:]}" if of else ""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(when)) + digits
    return f"{stem[: LONGEST_NAME - len(stamp) - 1].rstrip('-._')}-{stamp}"


def run_tags(request: "RunRequest") -> list[str]:
    """Tags of a run and of a deployment: `profile:NAME`, and `data:FILE` for each file of one's own."""
    return [f"profile:{request.profile or 'none'}", *(f"data:{name}" for name in _data_names(request))]


def folder_of(runs: Path, flow_run_id: str) -> Path | None:
    """The worktree that a Prefect run made for itself before; None where it has none."""
    return next(iter(sorted(runs.glob(f"*-{flow_run_id.replace('-', '')[-8:]}"))), None)


def _data_names(request: "RunRequest") -> list[str]:
    plain = (STRANGE.sub("-", SUFFIXES.sub("", Path(path).name.lower())).strip("-._") for path in request.data.values())
    return [name[:LONGEST_STEM].rstrip("-._") for name in plain if name]
