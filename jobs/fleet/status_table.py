"""How runs and releases stand, as a person reads it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from jobs.fleet.quality_text import quality_text
from jobs.fleet.status import Row
from jobs.quantities import size


def status_table(rows: Sequence[Row]) -> Table:
    """A line for each; columns that would be empty are left out, for terminals are narrow."""
    titles = ("model", "recipe", "state", "parts", "left", "heartbeat", "weights", "quality", "")
    lines = [_line(row) for row in rows]
    shown = [i for i in range(len(titles)) if any(line[i] not in ("", "–") for line in lines)]
    table = Table(*(titles[i] for i in shown))
    for line in lines:
        table.add_row(*(Text(line[i]) for i in shown))
    return table


def _line(row: Row) -> tuple[str, ...]:
    run = row.run
    parts = left = heartbeat = "–"
    if run is not None and run.parts is not None:
        parts = f"{run.parts_done}/{run.parts}"
        if run.seconds_a_part is not None:
            parts += f", {duration(run.seconds_a_part)} each"
    if run is not None and run.seconds_left is not None:
        left = duration(run.seconds_left)
    if run is not None and run.heartbeat_seconds is not None:
        heartbeat = f"{duration(run.heartbeat_seconds)} ago"
    state = row.state if row.release is None else f"{row.state}, release {row.release}"
    return (
        row.model,
        row.recipe,
        state,
        parts,
        left,
        heartbeat,
        _weights(row),
        quality_text(row.quality),
        row.text,
    )


def duration(seconds: float) -> str:
    """Such as 12 s, 3 min or 1.5 h."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _weights(row: Row) -> str:
    if row.stored_bytes is None:
        return "–"
    before = "" if row.source_bytes is None else f"{size(row.source_bytes)} → "
    return f"{before}{size(row.stored_bytes)}"
