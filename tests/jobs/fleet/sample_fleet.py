"""Pages of fleets that do not exist: of any size, with everything that an entry can show."""

from __future__ import annotations

import datetime
from typing import Any

from jobs.fleet.fleet_report import EntryLine, fleet_page
from jobs.fleet.nights import Night, NightEntry
from jobs.fleet.status import Row, RunStatus
from jobs.publish.closeness import Closeness

_BEGAN = datetime.datetime(2026, 11, 1, 2, 15, tzinfo=datetime.UTC)
_REASONS = ("source changed: model.weights.h5", "versions changed: jax 0.10.1 → 0.10.2")


def nights(entries: tuple[NightEntry, ...], number: int = 20) -> tuple[Night, ...]:
    """One a day, each with fewer of the entries than the one before."""
    return tuple(
        Night(
            catalog="team/catalog.yaml",
            began=(_BEGAN + datetime.timedelta(days=day)).isoformat(),
            seconds=600.0 + 60 * day,
            num_entries=len(entries),
            entries=entries[: max(1, len(entries) * (number - day) // number)],
        )
        for day in range(number)
    )


def lines(number: int, *, name: str = "model") -> list[EntryLine]:
    """Of ten, seven are published, and one each failed, failed its gate and is running."""
    made = [_line(i, f"{name}-{i:04d}", name) for i in range(number)]
    return sorted(made, key=lambda line: line.row.model)


def _line(i: int, model: str, name: str) -> EntryLine:
    kind = i % 10
    recipe = ("gptq-w4-g128", "int8", "awq-w4-g64")[i % 3]
    values: dict[str, Any] = {
        "model": model,
        "recipe": recipe,
        "source_bytes": (1 + i) << 24,
        "stored_bytes": (1 + i) << 22,
        "run_id": f"{model}-{recipe}",
    }
    result, text, mend = "published", "", ""
    row = Row(**values, state="published", release=1 + i % 4)
    if kind == 7:
        row = Row(**values, state="running", run=RunStatus(state="running", parts_done=5, parts=28))
        result = "elsewhere"
    elif kind == 8:
        result, text = "gate failed", "divergence 0.1512 nats, more than 0.1"
        row = Row(**values, state="gate failed", text=text)
        mend = f"quantfleet nightly team/catalog.yaml --only {model}"
    elif kind == 9:
        result = "failed"
        text = f"{name}: no config.json there; name the folder of a KerasHub preset"
        mend = f"quantfleet nightly team/catalog.yaml --only {model}"
    entry = NightEntry(
        model=model, recipe=recipe, request_id="", result=result, reasons=_REASONS, text=text
    )
    night = Night(
        catalog="team/catalog.yaml",
        began=(_BEGAN + datetime.timedelta(days=i % 20)).isoformat(),
        seconds=600.0,
        num_entries=1,
        entries=(entry,),
    )
    return EntryLine(
        row=row,
        report=f"../runs/{model}-{recipe}/report.html" if kind < 7 and name == "model" else "",
        quality=f"perplexity {20 + i / 7:.4g} → {21 + i / 7:.4g}",
        closeness=Closeness(figure="divergence", used=1.512 if kind == 8 else (i * 37 % 100) / 100),
        since=_BEGAN + datetime.timedelta(hours=i) if kind < 7 else None,
        decided=night,
        decision=entry,
        mend=mend,
    )


def sample_page(number: int, *, name: str = "model") -> bytes:
    """A fleet of so many entries."""
    shown = lines(number, name=name)
    entries = tuple(line.decision for line in shown if line.decision is not None)
    return fleet_page("s3://bucket/fleet", shown, nights(entries), num_damaged=0)
