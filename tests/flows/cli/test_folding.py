"""Tables that fit: which column folds first, and that nothing is lost."""

import io

import pytest
from rich.box import SIMPLE_HEAD
from rich.console import Console

from flows.cli.folding import Column, folding_table

COLUMNS = (
    Column(title="name"),
    Column(title="size", folds=1, right=True),
    Column(title="figures"),
    Column(title="owner", folds=2),
)
ROWS = (
    {"name": "first-of-all", "size": "1,000 MB", "figures": "loss 0.5", "owner": "somebody"},
    {"name": "second", "figures": ""},
)


def drawn(width: int, box=None) -> list[str]:
    stream = io.StringIO()
    console = Console(file=stream, width=width)
    console.print(folding_table(COLUMNS, ROWS, width=width, figures="figures", box=box))
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def test_with_room_every_column_stands_on_its_own() -> None:
    assert drawn(60)[0].split() == ["name", "size", "figures", "owner"]
    assert len(drawn(60)) == 3


def test_the_least_needed_folds_first() -> None:
    # first-of-all (12), loss 0.5 (8) and somebody (8) with two blanks between make 32; 1,000 MB would make it 42
    assert drawn(42)[0].split() == ["name", "size", "figures", "owner"]
    assert drawn(41)[0].split() == ["name", "figures", "owner"]
    assert drawn(32)[0].split() == ["name", "figures", "owner"]
    assert drawn(31)[0].split() == ["name", "figures"]


@pytest.mark.parametrize("width", [24, 31, 41, 60])
@pytest.mark.parametrize("box", [None, SIMPLE_HEAD])
def test_nothing_is_cut(width: int, box) -> None:
    lines = drawn(width, box)
    assert max(len(line) for line in lines) <= width
    text = "".join("".join(lines).split())
    for part in ("first-of-all", "1,000MB", "loss0.5", "somebody", "second"):
        assert part in text, (width, part, lines)
