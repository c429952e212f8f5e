"""Reports in a real browser, Debian's Chromium, which `.ci/run` installs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import vl_convert
from playwright.sync_api import Browser

from jobs.release.contents import read_run
from jobs.report.code_figures import worst_codes
from jobs.report.comparison import PairedDifference
from jobs.report.comparison_figures import Point, pareto_figure, ratio_figure
from jobs.report.figure import Figure
from jobs.report.figures import error_figures
from jobs.report.page import page
from jobs.report.run_report import run_report
from jobs.report.time_figures import stages_figure, workers_figure
from jobs.report.timeline import timeline
from jobs.report.worst_texts import LEVELS, worst_text
from pipeline.run.worst_windows import WorstWindow
from pipeline.storage.object_store import open_store
from tests.jobs.release.runs import finished
from tests.jobs.report.browser import Opened, chromium
from tests.jobs.report.test_code_figures import counts
from tests.jobs.report.test_figures import layer
from tests.jobs.report.test_page import HOSTILE
from tests.jobs.report.test_timeline import KILLED, RESUMED

pytestmark = pytest.mark.exhaustive


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


def hostile_page(num_blocks: int, num_layers: int) -> bytes:
    names = [HOSTILE] + [f"l{j}" for j in range(num_layers - 1)]
    layers = [
        layer(block, name, 0.1 + block + j, account={"damping": 0.01, "kept": HOSTILE})
        for block in range(num_blocks)
        for j, name in enumerate(names)
    ]
    found = timeline([KILLED, RESUMED])
    parts = ("rest", HOSTILE, "block_1")
    given = (*error_figures(layers), stages_figure(found, parts), workers_figure(found, parts))
    codes = worst_codes(layers, {one.path: counts(1 + i % 30) for i, one in enumerate(layers)})
    figures: list[Figure] = [
        *(one for one in given if one is not None),
        *(drawn for one in codes for drawn in (one.codes, one.scales)),
    ]
    bad = WorstWindow(
        text_set=HOSTILE,
        number=3,
        count=2,
        divergence=1.0,
        start=0,
        text=((HOSTILE, 0.0), (HOSTILE, 0.7), ("\u202e\x00", 3.0)),
    )
    run = SimpleNamespace(
        origin=SimpleNamespace(name=HOSTILE),
        recipe=SimpleNamespace(name=HOSTILE),
        schemes={HOSTILE: 1},
    )
    return page(
        "run_report.html.jinja",
        figures,
        run=run,
        headline=[(HOSTILE, HOSTILE)],
        evaluations=[
            (
                SimpleNamespace(figures={}),
                [SimpleNamespace(figure=HOSTILE, source=HOSTILE, result=HOSTILE, recovery=HOSTILE)],
                [(HOSTILE, HOSTILE)],
                [worst_text(bad)],
            )
        ],
        levels=LEVELS,
        worst=layers[:3],
        num_layers=len(layers),
        codes=codes,
        num_with_codes=len(layers) - 1,
        remarks=[HOSTILE],
        in_float=[(1, HOSTILE, HOSTILE)],
        notes=[HOSTILE],
        recipe=HOSTILE,
        facts=[(HOSTILE, HOSTILE)],
        commands=[SimpleNamespace(reader=HOSTILE, text=HOSTILE, note=HOSTILE)],
        license=SimpleNamespace(id=HOSTILE),
        timeline=found,
        stages=[(HOSTILE, 0.5)],
    )


def test_a_run_s_report_is_drawn_whole_dark_light_and_narrow(
    browser: Browser, tmp_path: Path
) -> None:
    run = str(finished())
    file = tmp_path / "report.html"
    file.write_bytes(run_report(read_run(open_store(run), run)))
    paper = set()
    for width, dark in ((1100, False), (1100, True), (360, False)):
        opened = Opened(browser, file, width=width, dark=dark)
        assert opened.said == []
        assert opened.marks("sizes") >= 6
        # Nothing is wider than the window but what scrolls by itself.
        assert opened.overflow() == 0
        paper.add(opened.page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert opened.faults() == []
    assert len(paper) == 2


def test_every_figure_has_its_marks_and_a_tooltip(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_bytes(hostile_page(4, 7))
    opened = Opened(browser, file)
    assert {one: opened.marks(one) >= 28 for one in ("share", "error")} == dict.fromkeys(
        ("share", "error"), True
    )
    assert opened.marks("workers") >= 2 + 3 + 7
    assert opened.marks("stages") >= 4
    histograms = [f"{kind}-{i}" for kind in ("codes", "scales") for i in range(1, 7)]
    assert [opened.marks(one) for one in histograms] == [32] * 6 + [24] * 6
    assert opened.page.locator("#codes-7").count() == 0
    for figure in ("share", "error", "stages", "workers", *histograms):
        picture = opened.page.locator(f"#{figure} svg")
        assert len(set(picture.screenshot())) > 50  # not an empty region
    opened.page.locator("#scales-6 .mark-rect path").nth(12).hover()
    tooltip = opened.page.locator("#vg-tooltip-element")
    tooltip.wait_for(state="visible")
    assert "times the median" in tooltip.inner_text()
    opened.page.locator("#share .mark-rect path").first.hover()
    tooltip.wait_for(state="visible")
    assert "of rounding's error" in tooltip.inner_text()


def test_histograms_are_beside_each_other_below_each_other_and_read_aloud(
    browser: Browser, tmp_path: Path
) -> None:
    file = tmp_path / "report.html"
    file.write_bytes(hostile_page(4, 7))
    for width, dark, columns in ((1100, False, 3), (1100, True, 3), (360, False, 1)):
        opened = Opened(browser, file, width=width, dark=dark)
        assert opened.said == []
        boxes = [opened.page.locator(f"#codes-{i} svg").bounding_box() for i in range(1, 7)]
        assert len({box["x"] for box in boxes if box}) == columns
        assert opened.overflow() == 0
        assert opened.faults() == []


def test_hostile_names_are_shown_as_text_and_nothing_of_them_runs(
    browser: Browser, tmp_path: Path
) -> None:
    file = tmp_path / "report.html"
    file.write_bytes(hostile_page(2, 3))
    opened = Opened(browser, file)
    assert opened.said == []
    assert opened.page.locator("img").count() == 0
    assert opened.page.locator("script:not([type])").count() == 2
    assert HOSTILE[:40] in opened.page.locator("h1").inner_text()
    # Names reach the page through tooltips, too.
    opened.page.locator("#share .mark-rect path").first.hover()
    opened.page.locator("#vg-tooltip-element").wait_for(state="visible")
    assert opened.page.locator("img").count() == 0


def test_runs_side_by_side_are_drawn_and_their_names_stay_text(
    browser: Browser, tmp_path: Path
) -> None:
    layers = [layer(b, name, 1.0 + b) for b in range(3) for name in ("query", HOSTILE)]
    worse = [layer(b, name, 2.0) for b in range(3) for name in ("query", HOSTILE)]
    points = [Point(name=n, recipe=HOSTILE, stored_bytes=1 << 20, loss=1.0) for n in "AB"]
    figures = [pareto_figure(points, "perplexity"), ratio_figure(layers, worse)]
    run = SimpleNamespace(
        recipe=SimpleNamespace(name=HOSTILE), origin=SimpleNamespace(name=HOSTILE)
    )
    file = tmp_path / "page.html"
    file.write_bytes(
        page(
            "comparison.html.jinja",
            [one for one in figures if one is not None],
            runs=[SimpleNamespace(label=HOSTILE, url=HOSTILE, run=run)] * 2,
            sources=["a", "b"],
            rows=[(HOSTILE, [HOSTILE] * 2)],
            quality=[(HOSTILE, [HOSTILE] * 3)],
            measured=[(HOSTILE, HOSTILE)],
            differences=[
                PairedDifference(
                    name="B", text_set=HOSTILE, mean=-0.1, standard_error=None, better=1, windows=1
                )
            ],
            recipes=[[(HOSTILE, True), (HOSTILE, False)]] * 2,
        )
    )
    for width in (1100, 360):
        opened = Opened(browser, file, width=width)
        assert opened.said == []
        assert opened.page.locator("img").count() == 0
        assert opened.marks("ratio") >= 6
        assert opened.marks("pareto") >= 2
        assert opened.overflow() == 0
        assert opened.faults() == []


def test_a_keyboard_reaches_sections_tables_and_the_recipe(
    browser: Browser, tmp_path: Path
) -> None:
    file = tmp_path / "report.html"
    file.write_bytes(hostile_page(2, 3))
    opened = Opened(browser, file)
    reached = []
    for _ in range(12):
        opened.page.keyboard.press("Tab")
        reached.append(
            opened.page.evaluate(
                "document.activeElement.getAttribute('aria-label') "
                "|| document.activeElement.textContent.trim()"
            )
        )
    assert reached[:6] == ["Quality", "Size", "Layers", "Time", "Use", "Origin"]
    assert "Layers that lost most" in reached
    assert "Recipe" in reached


def test_ten_thousand_layers_fit_into_five_megabytes(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_bytes(hostile_page(100, 100))
    assert file.stat().st_size < 5_000_000
    opened = Opened(browser, file)
    assert opened.said == []
    assert opened.marks("share") >= 10_000


def test_the_scripts_are_those_of_the_packages() -> None:
    from jobs.report.page import _text

    assert _text("vega.js") == vl_convert.javascript_bundle()
