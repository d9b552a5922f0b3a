"""Tables are written the same each time, refuse rows of another shape, and come back memory-mapped."""

import pytest

from tasks import tables
from tasks.tables import CACHE, SCHEMAS, read_table, write_table


def prompts(count):
    return [{"id": str(i), "prompt": f"Where is item {i}?", "task": "shop"} for i in range(count)]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [
        {
            "prompt_id": "p",
            "prompt": "Hello\u2028there",
            "task": "",
            "split": "train",
            "sample": 3,
            "model": "sft",
            "temperature": 0.7,
            "response": "",
            "response_ids": [1, 2],
            "logprobs": [-0.5, -1.25],
            "behaviour_logprobs": [-0.25, -1.0],
            "finished": True,
            "score": None,
        }
    ]
    assert write_table(tmp_path / "r.parquet", rows, SCHEMAS["responses"]) == 1
    assert read_table(tmp_path / "r.parquet").to_list() == rows


def test_no_rows_is_a_table_with_columns(tmp_path):
    assert write_table(tmp_path / "p.parquet", [], SCHEMAS["prompts"]) == 0
    table = read_table(tmp_path / "p.parquet")
    assert len(table) == 0
    assert table.column_names == ["id", "prompt", "task"]


def test_same_rows_same_bytes_over_several_row_groups(tmp_path):
    for name in ("one", "two"):
        assert write_table(tmp_path / name / "p.parquet", iter(prompts(20_000)), SCHEMAS["prompts"]) == 20_000
    first, second = (tmp_path / name / "p.parquet" for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()
    assert read_table(first)["prompt"][19_999] == "Where is item 19999?"


def test_a_table_is_mapped_from_the_run_folder_and_older_versions_go(tmp_path):
    path = tmp_path / "p.parquet"
    write_table(path, prompts(2), SCHEMAS["prompts"])
    old = read_table(path)
    assert all((tmp_path / CACHE) in (tmp_path / file["filename"]).parents for file in old.cache_files)
    assert old.cache_files
    write_table(path, prompts(3), SCHEMAS["prompts"])
    assert len(read_table(path)) == 3
    assert len(list(CACHE.iterdir())) == 1
    assert old["prompt"][1] == "Where is item 1?"


def test_processes_that_read_a_new_table_at_the_same_time_all_can(tmp_path, monkeypatch):
    """While this one makes the mapped form, another does so too and is done first."""
    path = tmp_path / "p.parquet"
    write_table(path, prompts(2), SCHEMAS["prompts"])
    plain, others = tables.pa.ipc.new_stream, []

    def new_stream(*arguments):
        if not others:
            others.append(None)
            others[0] = read_table(path)
        return plain(*arguments)

    monkeypatch.setattr(tables.pa.ipc, "new_stream", new_stream)
    assert len(read_table(path)) == 2
    assert others[0]["prompt"][1] == "Where is item 1?"
    assert [file.name for file in CACHE.glob("*/*")] == ["table.arrow"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "1", "prompt": "x"}, r"row 0: missing columns \['task'\]"),
        ({"id": "1", "prompt": "x", "task": "", "more": 1}, r"unknown columns \['more'\]"),
        ({"id": "1", "prompt": None, "task": ""}, r"row 0: null in \['prompt'\]"),
    ],
)
def test_rows_of_another_shape_are_refused_and_leave_no_file(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        write_table(tmp_path / "p.parquet", [row], SCHEMAS["prompts"])
    assert list(tmp_path.iterdir()) == []


def test_seconds_of_a_vote_may_be_unknown(tmp_path):
    row = dict.fromkeys(SCHEMAS["votes"].names, "x") | {"strength": 1, "seconds": None}
    write_table(tmp_path / "v.parquet", [row], SCHEMAS["votes"])
    assert read_table(tmp_path / "v.parquet")[0] == row
