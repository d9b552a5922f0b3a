"""docs/numerics.md and the tests that are named after its points hold each other."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| (\d+) \| (.+) \| (.+) \|$", re.MULTILINE)
POINTS = range(1, 43)


def points_of(test: str) -> set[int]:
    """The points in a test's name, such as 5 and 7 in `test_n05_n07_padding_pays_nothing`."""
    numbered = re.match(r"test((?:_n\d\d)+)_", test)
    return {int(number) for number in re.findall(r"\d\d", numbered[1])} if numbered else set()


@functools.cache
def names_in_tree() -> set[str]:
    names = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        names |= {
            node.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        }
    return names


def listed() -> dict[int, tuple[str, list[str]]]:
    """Each row's number, what it says, and the tests it names."""
    page = (ROOT / "docs/numerics.md").read_text()
    rows = ROW.findall(page)
    assert len({number for number, _, _ in rows}) == len(rows), "a point is listed twice"
    return {int(number): (said, re.findall(r"`(test_\w+)`", tests)) for number, said, tests in rows}


def test_every_point_is_listed() -> None:
    assert sorted(listed()) == list(POINTS)


@pytest.mark.parametrize("point", POINTS)
def test_a_listed_point_has_tests_of_its_name_or_says_why_not(point: int) -> None:
    said, names = listed()[point]
    if said.startswith("Does not apply"):
        assert not names
        return
    assert names, f"point {point} names no test and does not say why"
    tree = names_in_tree()
    for name in names:
        assert name in tree, f"point {point} names {name}, which no test is called"
        assert point in points_of(name), f"point {point} names {name}, which is of another point"


def test_no_test_names_a_point_that_is_not_listed() -> None:
    strange = {name for name in names_in_tree() if not points_of(name) <= set(listed())}
    assert not strange
