"""The glossary is true: its files are there, its names can be imported from them, and its lines are in order."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/glossary.md").read_text()
ROWS = [line.strip("| \n").split(" | ") for line in PAGE.splitlines() if line.startswith("| ")][1:]
WHERE = re.compile(r"`((?:rlhf_core|tasks|flows)/[\w/]+\.py)`(?: \(((?:`\w+`(?:, )?)+)\))?")
EXPECTED = (
    "ballot, candidate, card, champion, drift, gate, guard, held-out, identity of a prompt, judgement, lineage, pair, "
    "rollout, run, stage, version, vote"
)


def test_every_line_has_a_term_a_meaning_and_a_place_and_terms_are_in_order() -> None:
    assert all(len(row) == 3 and WHERE.fullmatch(row[2]) for row in ROWS)
    terms = [row[0].strip("`").replace("_", " ").lower() for row in ROWS]
    assert terms == sorted(set(terms))
    assert set(EXPECTED.split(", ")) <= set(terms)


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_what_a_line_names_is_there(row: list[str]) -> None:
    """And defined there, not only imported."""
    file, names = WHERE.fullmatch(row[2]).groups()
    assert (ROOT / file).is_file()
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    for name in re.findall(r"\w+", names or ""):
        assert getattr(getattr(module, name), "__module__", module.__name__) in (module.__name__, "typing")


def test_the_front_pages_lead_to_it() -> None:
    assert "(docs/glossary.md)" in (ROOT / "README.md").read_text()
    assert "(glossary.md)" in (ROOT / "docs/architecture.md").read_text()
