"""The report as a person meets it: in a browser, on a phone, on paper."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.browser import browser, needs_browser

from rlhf_core.config import Params
from tasks.stages.report.html.page import render
from tasks.stages.report.html.sources import read_run

pytestmark = needs_browser


@pytest.fixture(scope="module")
def chromium() -> Iterator:
    with browser() as opened:
        yield opened


@pytest.fixture
def page_file(make_run, tmp_path: Path) -> Path:
    params = Params()
    path = tmp_path / "report.html"
    path.write_text(render(read_run(make_run(params), params.align.algorithms), params, tmp_path), encoding="utf-8")
    return path


def test_on_a_phone_the_comparison_stacks_and_nothing_is_cut(chromium, page_file: Path) -> None:
    page = chromium.new_page(viewport={"width": 360, "height": 740})
    page.goto(page_file.as_uri())
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 360, f"the page scrolls sideways: {wide}"
    row = page.locator("table.forest tbody tr:not(:has(.group))").first
    boxes = [cell.bounding_box() for cell in row.locator("th, td").all()]
    assert len(boxes) == 5
    assert all(one["y"] + one["height"] <= other["y"] + 1 for one, other in itertools.pairwise(boxes))
    assert boxes[1]["width"] > 250, "the interval has the width of the page"
    said = [
        cell.evaluate("cell => getComputedStyle(cell, '::before').content")
        for cell in row.locator("td[data-label]").all()
    ]
    assert [text.strip('"') for text in said] == ["wins / ties / losses: ", "p: "], "without the heads of columns"


def test_on_a_desk_a_row_of_the_comparison_is_a_row(chromium, page_file: Path) -> None:
    page = chromium.new_page(viewport={"width": 1200, "height": 800})
    page.goto(page_file.as_uri())
    row = page.locator("table.forest tbody tr:not(:has(.group))").first
    boxes = [cell.bounding_box() for cell in row.locator("th, td").all()]
    assert max(box["y"] for box in boxes) - min(box["y"] for box in boxes) < 4
    page.close()


def test_on_paper_folded_parts_are_open(chromium, page_file: Path) -> None:
    page = chromium.new_page()
    page.goto(page_file.as_uri())
    inside = page.locator("#figures details table").first
    assert not inside.is_visible(), "folded on the screen"
    page.emulate_media(media="print")
    assert inside.is_visible()
    box = inside.bounding_box()
    assert box is not None
    assert box["height"] > 50
    page.close()


PAPER = 718  # pixels of an A4 page between the margins that browsers leave unless told


@pytest.mark.parametrize(("width", "media"), [(PAPER, "print"), (1200, "screen"), (360, "screen")])
def test_nothing_that_was_folded_goes_over_the_edge(chromium, page_file: Path, width: int, media: str) -> None:
    page = chromium.new_page(viewport={"width": width, "height": 1000})
    page.goto(page_file.as_uri())
    page.emulate_media(media=media)
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    over = page.evaluate(
        """width => [...document.querySelectorAll("body *")]
            .filter(one => one.getClientRects().length && one.getBoundingClientRect().right > width + 1)
            .filter(one => matchMedia("print").matches || !one.closest(".wide"))  // which scrolls, but not on paper
            .map(one => `${one.tagName} ${one.className} ${one.textContent.trim().slice(0, 40)}`)""",
        width,
    )
    assert over == []
    page.close()


def test_headings_go_down_one_level_at_a_time_and_headers_say_what_they_head(chromium, page_file: Path) -> None:
    page = chromium.new_page()
    page.goto(page_file.as_uri())
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4,h5,h6')].map(h => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels)), levels
    unscoped = page.evaluate("[...document.querySelectorAll('th:not([scope])')].map(t => t.outerHTML)")
    assert unscoped == []
    empty = page.evaluate("[...document.querySelectorAll('th')].filter(t => !t.textContent.trim()).length")
    assert empty == 0
    rows = page.evaluate("[...document.querySelectorAll('tbody tr')].filter(r => !r.querySelector('th')).length")
    assert rows == 0, "a row without a header of its own"
    page.close()
