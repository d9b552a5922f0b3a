"""Rows that come without a side get the one that `validate` decided for their prompt."""

import pytest

from rlhf_core.text.identity import prompt_group
from tasks import paths
from tasks.stages.held_out import with_split
from tasks.tables import SCHEMAS, write_table


def test_a_row_gets_the_side_of_its_prompt_in_any_form(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    groups = [{"group": prompt_group("How much?")}]
    write_table(paths.VALIDATE / "heldout_groups.parquet", groups, SCHEMAS["heldout_groups"])
    rows = [{"prompt": "how  MUCH?", "score": 1.0}, {"prompt": "How many?", "score": 2.0}]
    assert list(with_split(rows)) == [rows[0] | {"split": "heldout"}, rows[1] | {"split": "train"}]
    assert all("split" not in row for row in rows)
