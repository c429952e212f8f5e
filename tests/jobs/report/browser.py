"""Pages in a real browser, Debian's Chromium, which `.ci/run` installs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright


@contextmanager
def chromium() -> Iterator[Browser]:
    program = shutil.which("chromium")
    assert program, "install Debian's chromium"
    with sync_playwright() as driver:
        # Within a container Chromium has no privileges to build its own sandbox with.
        found = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield found
        found.close()


class Opened:
    """A page, opened from disk with the network off, and what its console said."""

    def __init__(self, browser: Browser, file: Path, *, width: int = 1100, dark: bool = False):
        self.said: list[str] = []
        context = browser.new_context(
            offline=True,
            viewport={"width": width, "height": 900},
            color_scheme="dark" if dark else "light",
        )
        self.page: Page = context.new_page()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.goto(file.as_uri())
        # No script may be waited for: the page's policy lets none in.
        expect(self.page.locator("[data-figure]:not([data-drawn])")).to_have_count(0, timeout=60e3)

    def marks(self, figure: str) -> int:
        return self.page.locator(f"#{figure} .mark-rect path, #{figure} .mark-symbol path").count()

    def faults(self) -> list[tuple[str, str]]:
        """What axe-core finds wrong for people who cannot see, or use a mouse: rule and element."""
        found: list[dict[str, Any]] = Axe().run(self.page).response["violations"]
        return [(one["id"], one["nodes"][0]["html"]) for one in found]

    def overflow(self) -> int:
        """Pixels by which the page is wider than its window."""
        wide: int = self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        return max(0, wide)
