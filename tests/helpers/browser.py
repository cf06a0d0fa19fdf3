"""A real browser, without a window."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator

from playwright.sync_api import Browser, Page, sync_playwright


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    path = shutil.which("chromium")
    assert path, "make debian installs chromium, in which pages are looked at"
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


def fits(page: Page) -> bool:
    """Say whether nothing stands beyond the window's edge."""
    found: bool = page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    return found
