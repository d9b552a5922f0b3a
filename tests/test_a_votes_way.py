"""The page that follows a vote through the code: its files and functions are there, and its numbers are the demo's."""

import ast
import json
import re
from pathlib import Path

import pytest

from rlhf_core.data.reading.readers import read_rows
from rlhf_core.data.reading.records import to_record
from rlhf_core.feedback.ballots import Vote
from rlhf_core.feedback.labelling import aggregate

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/a-votes-way.md").read_text()
FILES = re.findall(r"`((?:rlhf_core|tasks|flows)/[\w/]+(?:\.py|/))`(?:\s+\(((?:`\w+`(?:,\s+)?)+)\))?", PAGE)


def test_it_has_ten_steps_with_a_file_each() -> None:
    steps = re.findall(r"^(\d+)\. \*\*.*?(?=^\d+\. |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert [int(number) for number in steps] == list(range(1, 11))
    assert all(re.search(r"`[\w/]+\.py`", step) for step in re.split(r"^\d+\. ", PAGE, flags=re.MULTILINE)[1:])


@pytest.mark.parametrize(("file", "names"), FILES)
def test_what_it_names_is_there(file: str, names: str) -> None:
    path = ROOT / file
    assert path.exists()
    if names:
        defined = {node.name for node in ast.walk(ast.parse(path.read_text())) if hasattr(node, "name")}
        assert set(re.findall(r"\w+", names)) <= defined


def test_its_numbers_are_those_of_the_demo() -> None:
    rows = [record.values for record in (to_record("votes", row) for row in read_rows(ROOT / "data/votes.jsonl"))]
    first = [row for row in rows if row["pair_id"] == "v000"]
    assert (len(rows), len({row["pair_id"] for row in rows})) == (750, 150)
    shown = json.loads(re.search(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)[1])
    assert {key: first[0][key] for key in ("annotator", "choice", "strength", "seconds", "response_b")} == {
        key: shown[key] for key in ("annotator", "choice", "strength", "seconds", "response_b")
    }
    votes = [Vote(annotator=row["annotator"], choice=row["choice"], strength=row["strength"]) for row in first]
    assert [(vote.choice, vote.strength) for vote in votes if vote.choice == "b"] == [("b", n) for n in (3, 2, 2, 2)]
    label = aggregate(votes)
    assert (label.label, label.agreement, label.margin) == ("b", 0.8, pytest.approx(1.6))
    assert "agreement of 0.8" in PAGE
    assert "= 1.6" in PAGE
