"""What a run's drivers noted of it, in order: for people, who want to know how it goes."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import DamagedObjectError, MissingObjectError
from pipeline.events import EVENTS_PREFIX
from pipeline.storage.object_store import ObjectStore

_MOST_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Event:
    """One line.

    Attributes:
        time: by the driver's clock.
        name: "started", "committed", …
        values: the rest.
    """

    time: datetime.datetime
    name: str
    values: dict[str, Any]


def read_events(store: ObjectStore, keys: Sequence[str] | None = None) -> tuple[Event, ...]:
    """All events of the run at the store's root, by time; lines that are none are left out.

    Args:
        keys: of the files to read; None for all.
    """
    found: list[Event] = []
    for key in store.list(EVENTS_PREFIX) if keys is None else keys:
        try:
            content = store.get(key, at_most=_MOST_BYTES)
        except (MissingObjectError, DamagedObjectError):
            continue
        found += filter(None, map(_parsed, content.decode("utf-8", "replace").splitlines()))
    return tuple(sorted(found, key=lambda event: event.time))


def event_lines(events: Sequence[Event]) -> Iterator[str]:
    """A line for each event."""
    for event in events:
        values = dict(event.values)
        text = values.pop("text", "")
        seconds = values.pop("seconds", {})
        values |= {f"{stage}_seconds": round(spent, 2) for stage, spent in seconds.items()}
        summary = values.pop("summary", None)
        if isinstance(summary, dict):
            values |= {name: summary.get(name) for name in ("stored_bytes", "wall_seconds")}
        said = " ".join(f"{name}={json.dumps(value)}" for name, value in values.items())
        stamp = event.time.isoformat(timespec="seconds")
        yield " ".join(filter(None, (stamp, event.name, text, said)))


def event_dict(event: Event) -> dict[str, Any]:
    """Plain JSON values."""
    return {"time": event.time.isoformat(), "event": event.name, **event.values}


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast the latest driver of a run is, or was.

    Attributes:
        seconds_a_part: between its start and its latest part, on average.
        text: the latest thing that it said in words.
    """

    seconds_a_part: float | None = None
    text: str = ""


def pace(events: Sequence[Event]) -> Pace:
    """Of one driver's events."""
    committed = [event for event in events if event.name == "committed"]
    texts = [str(event.values["text"]) for event in events if event.values.get("text")]
    seconds = None
    if committed:
        elapsed = (committed[-1].time - events[0].time).total_seconds()
        seconds = max(elapsed, 0.0) / len(committed)
    return Pace(seconds_a_part=seconds, text=texts[-1] if texts else "")


def _parsed(line: str) -> Event | None:
    try:
        values = json.loads(line)
        time = datetime.datetime.fromisoformat(values.pop("time"))
        name = str(values.pop("event"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if time.tzinfo is None or not isinstance(values.get("seconds", {}), dict):
        return None
    return Event(time=time, name=name, values=values)
