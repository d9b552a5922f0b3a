"""The side of rows that come without one: votes and grades on a criterion, whose tables have no column `split`."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rlhf_core.data.cleaning.splits import SplitRule
from tasks import paths
from tasks.tables import read_table


def with_split(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each row with its `split`, as `validate` decided it for the prompt."""
    split = SplitRule(frozenset(read_table(paths.VALIDATE / "heldout_groups.parquet")["group"]))
    for row in rows:
        yield {**row, "split": split(row["prompt"])}
