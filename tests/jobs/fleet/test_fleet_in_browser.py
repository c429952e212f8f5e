"""A fleet's page in a real browser, Debian's Chromium, which `.ci/run` installs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from tests.jobs.fleet.sample_fleet import sample_page
from tests.jobs.report.browser import Opened, chromium
from tests.jobs.report.test_page import HOSTILE

pytestmark = pytest.mark.exhaustive


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "index.html"
    file.write_bytes(sample_page(30))
    return file


def models(opened: Opened) -> list[str]:
    """Those shown, in the table's order."""
    found: list[str] = opened.page.locator("#entries-table tbody tr:not([hidden]) th").evaluate_all(
        "cells => cells.map(cell => cell.textContent.trim().split(/\\s/)[0])"
    )
    return found


def test_the_page_is_drawn_whole_dark_light_and_narrow(browser: Browser, file: Path) -> None:
    for width, dark in ((1400, False), (1100, True), (360, False)):
        opened = Opened(browser, file, width=width, dark=dark)
        assert opened.said == []
        assert opened.marks("nights") >= 20
        assert len(set(opened.page.locator("#nights svg").screenshot())) > 50
        # Nothing is wider than the window but what scrolls by itself.
        assert opened.overflow() == 0
        assert opened.faults() == []
        assert "ago" in opened.page.locator("#entries-table time").first.inner_text()


def test_a_keyboard_sorts_and_filters_the_table(browser: Browser, file: Path) -> None:
    opened = Opened(browser, file)
    page, keyboard = opened.page, opened.page.keyboard
    given = models(opened)
    assert given == sorted(given)
    page.locator("#words").focus()
    keyboard.type("gate failed 0.10")
    assert models(opened) == ["model-0008", "model-0018", "model-0028"]
    expect(page.locator("#told")).to_have_text("3 of 30 entries")
    keyboard.press("Enter")
    keyboard.press("ControlOrMeta+a")
    keyboard.press("Delete")
    keyboard.press("Tab")
    keyboard.type("running")
    assert models(opened) == ["model-0007", "model-0017", "model-0027"]
    keyboard.press("Home")
    assert models(opened) == given
    # To the head of the column of the gate, and back: least used first, then most.
    page.get_by_role("button", name="used of its gate").focus()
    keyboard.press("Enter")
    first = models(opened)
    head = page.locator("th[aria-sort]")
    expect(head).to_have_count(1)
    expect(head).to_have_attribute("aria-sort", "ascending")
    keyboard.press("Space")
    expect(head).to_have_attribute("aria-sort", "descending")
    assert first[0] == "model-0000"
    assert set(models(opened)[:3]) == {"model-0008", "model-0018", "model-0028"}
    # What was never published stays last, whichever comes first.
    for key in ("Enter", "Enter"):
        page.get_by_role("button", name="published", exact=True).focus()
        keyboard.press(key)
        assert {one[-1] for one in models(opened)[-9:]} == {"7", "8", "9"}
    assert opened.faults() == []
    assert opened.said == []


def test_hostile_names_are_shown_as_text_and_nothing_of_them_runs(
    browser: Browser, tmp_path: Path
) -> None:
    file = tmp_path / "index.html"
    file.write_bytes(sample_page(10, name=HOSTILE))
    opened = Opened(browser, file)
    assert opened.said == []
    assert opened.page.locator("img").count() == 0
    assert HOSTILE[:40] in opened.page.locator("#entries-table th[scope=row]").first.inner_text()
    opened.page.locator("#nights .mark-rect path").first.hover()
    opened.page.locator("#vg-tooltip-element").wait_for(state="visible")
    assert opened.page.locator("img").count() == 0


def test_a_thousand_entries_sort_and_filter_at_once(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "index.html"
    file.write_bytes(sample_page(1000))
    opened = Opened(browser, file)
    assert opened.said == []
    opened.page.locator("#words").fill("model-0999")
    assert models(opened) == ["model-0999"]
    opened.page.locator("#words").fill("")
    opened.page.get_by_role("button", name="weights").click()
    assert models(opened) == sorted(models(opened))
    assert len(models(opened)) == 1000
