"""What a terminal shows of a catalog."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from jobs.progress.catalog_view import CatalogView, EntryProgress


def shown(view: CatalogView, width: int) -> list[str]:
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(view)
    return [line.rstrip() for line in console.export_text().splitlines()]


@pytest.mark.parametrize("width", [80, 120])
def test_entries_are_counted_by_priority_and_those_at_work_or_failed_are_named(width: int) -> None:
    now = [0.0]
    view = CatalogView(
        [
            EntryProgress(name="alpha × int8", priority=9, phase="done"),
            EntryProgress(name="beta × int8", priority=0),
            EntryProgress(name="gamma × int8", priority=0),
            EntryProgress(name="[bold]delta", priority=-3, phase="failed", text="no " + "x" * 200),
        ],
        clock=lambda: now[0],
    )
    view.show(EntryProgress(name="beta × int8", priority=0, phase="running"))
    now[0] = 65.0
    lines = shown(view, width)
    assert lines[0].startswith("catalog ━")
    assert lines[0].endswith("2/4 entries")
    assert lines[1] == "1 done · 1 running · 1 waiting · 1 failed"
    assert [line.split() for line in lines[2:6]] == [
        ["priority", "done", "running", "waiting", "failed"],
        ["9", "1"],
        ["0", "1", "1"],
        ["-3", "1"],
    ]
    assert lines[6] == "running  beta × int8  65 s"
    assert lines[7].startswith("failed   [bold]delta  no xxx")
    assert lines[7].endswith("…")
    assert max(map(len, lines)) <= width


def test_a_thousand_entries_fit_a_screen() -> None:
    entries = [
        EntryProgress(name=f"m{i}", priority=i % 50, phase="failed" if i % 3 else "running")
        for i in range(1000)
    ]
    lines = shown(CatalogView(entries), 80)
    assert len(lines) <= 24
    assert lines[0].endswith("666/1000 entries")
    lower = [entry.phase for entry in entries if entry.priority < 44]
    counts = [str(lower.count("running")), str(lower.count("failed"))]
    assert ["lower", *counts] in [line.split() for line in lines]
    assert "         and 329 more" in lines
