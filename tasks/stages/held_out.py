"""The side of each prompt, as `validate` decided it, for the stages after it."""

from collections.abc import Callable

from rlhf_core.data.cleaning.splits import Split, split_of
from tasks import paths
from tasks.tables import read_table


def heldout_rule() -> Callable[[str], Split]:
    """The side of a prompt."""
    groups = set(read_table(paths.VALIDATE / "heldout_groups.parquet")["group"])
    return lambda prompt: split_of(prompt, groups)
