"""Tables that fit their width: what has no room as a column stands as words under the figures, and nothing is cut.

A terminal of 80 columns cannot hold seven columns side by side; rich would shrink every one until names are a letter
wide. Here the names and the figures keep their room, and the columns that matter least fold first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.box import Box
from rich.cells import cell_len
from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

LEAST_FOR_FIGURES = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One column.

    Attributes:
        title: its heading.
        folds: when its turn to fold comes, the lowest first; None for one that always stays.
        right: whether it is set flush right, as figures are.
    """

    title: str
    folds: int | None = None
    right: bool = False


def folding_table(
    columns: Sequence[Column],
    rows: Sequence[Mapping[str, str | Text]],
    *,
    width: int,
    figures: str | None = None,
    box: Box | None = None,
    title: str | None = None,
) -> Table:
    """Lay out rows in at most `width` columns of characters.

    Args:
        columns: in the order in which they stand.
        rows: cells by title; what a row lacks is empty.
        width: of the terminal or page.
        figures: title of the column that wraps and takes the words of those that fold. Without it what folds stands
            under the last column that stays.
        box: how rich draws the table.
        title: set above it.
    """
    home = figures or next(column.title for column in reversed(columns) if column.folds is None)
    # rich sets a blank on each side of a cell, and a box's line between two and at both ends; at its ends no blanks
    gap, edges = (3, 2) if box else (2, 0)
    folded = _folded(columns, rows, width - edges, gap, home)
    stay = [column for column in columns if column.title not in folded]
    table = Table(box=box, pad_edge=False, title=title, title_justify="left", header_style="bold")
    for column in stay:
        wraps = column.title == home
        side: JustifyMethod = "right" if column.right else "left"
        table.add_column(column.title, justify=side, no_wrap=not wraps, overflow="fold", ratio=1 if wraps else None)
    for row in rows:
        cells = {column.title: row.get(column.title, "") for column in stay}
        words = [f"{name} {row[name]}" for name in folded if str(row.get(name, ""))]
        if words:
            above = [cells[home], "\n"] if str(cells[home]) else []
            cells[home] = Text.assemble(*above, (" · ".join(words), "dim"))
        table.add_row(*cells.values())
    return table


def _folded(
    columns: Sequence[Column], rows: Sequence[Mapping[str, str | Text]], width: int, gap: int, home: str
) -> list[str]:
    """Titles of the columns that have no room, in the order in which the columns stand."""
    room = {column.title: _natural(column.title, rows) for column in columns}
    room[home] = min(room[home], max(LEAST_FOR_FIGURES, cell_len(home)))
    folded: set[str] = set()
    for column in sorted(
        (column for column in columns if column.folds is not None), key=lambda column: column.folds or 0
    ):
        left = [room[other.title] for other in columns if other.title not in folded]
        if sum(left) + gap * (len(left) - 1) <= width:
            break
        folded.add(column.title)
    return [column.title for column in columns if column.title in folded]


def _natural(title: str, rows: Sequence[Mapping[str, str | Text]]) -> int:
    cells = [title, *(line for row in rows for line in str(row.get(title, "")).split("\n"))]
    return max(cell_len(cell) for cell in cells)
