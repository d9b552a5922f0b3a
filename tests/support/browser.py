"""A real browser for tests of pages: Debian's Chromium, driven by Playwright. Where there is none, tests say so."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CANDIDATES = ("chromium", "chromium-browser", "google-chrome")
FOUND = os.environ.get("CHROMIUM") or next((path for name in CANDIDATES if (path := shutil.which(name))), None)

needs_browser = pytest.mark.skipif(FOUND is None, reason="no Chromium here (apt-get install chromium, or set CHROMIUM)")


@contextmanager
def browser() -> Iterator["Browser"]:
    """A browser without a window; it has no network but what the page asks for."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=FOUND, args=["--no-sandbox"])
        try:
            yield opened
        finally:
            opened.close()
