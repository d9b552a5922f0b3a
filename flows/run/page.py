"""Which report of a run to show: the run's own page, or the one that DVC keeps. Imports nothing that takes time."""

from pathlib import Path

from tasks import paths

ROOM, BEGIN, END = "<!-- the run -->", "<!-- the run: begin -->", "<!-- the run: end -->"
"""The place that DVC's page leaves for the band, and what stands around the band once it is put in."""


def page_of_run(root: Path) -> Path | None:
    """The page to show: that of the run if it is of the figures as they stand, else DVC's; None where there is none.

    Stages may have run without the control plane since (`dvc repro`); then the band would speak of other models.
    """
    bare = root / paths.REPORT_PAGE
    if is_current(root):
        return root / paths.RUN_PAGE
    return bare if bare.is_file() else None


def is_current(root: Path) -> bool:
    """Whether `reports/report.html` is the page that DVC keeps, but for its band."""
    before, begun, rest = text_of(root / paths.RUN_PAGE).partition(BEGIN)
    _, ended, after = rest.partition(END)
    return bool(begun and ended) and before + ROOM + after == text_of(root / paths.REPORT_PAGE)


def text_of(path: Path) -> str:
    """What a page holds; empty where there is none."""
    return path.read_text(encoding="utf-8") if path.is_file() else ""
