"""What happened when and where: for people, and never read to decide anything.

Each invocation writes one file below `events/`, a JSON object a line.

What a run's drivers noted of it, in order: for people, who want to know how it goes.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import DamagedObjectError, MissingObjectError
from pipeline.executor.ray_cluster import Resources
from pipeline.plan import Plan
from pipeline.run.driver import Report, Step
from pipeline.storage.object_store import ObjectStore

EVENTS_PREFIX = "events/"


class EventLog:
    """Collects a run's events, and writes them whenever a part was committed.

    Attributes:
        seconds: of work by stage, all workers together.
    """

    def __init__(
        self, store: ObjectStore, plan: Plan, resources: Resources, epoch: int | None = None
    ) -> None:
        """Args: epoch: of the lease under which the run is driven; None where it is finished."""
        now = datetime.datetime.now(datetime.UTC)
        self._store = store
        self._key = f"{EVENTS_PREFIX}{now:%Y%m%dT%H%M%S}-{secrets.token_hex(4)}.jsonl"
        self._lines: list[str] = []
        self.seconds: Counter[str] = Counter()
        self._add(
            "started",
            plan_digest=plan.digest,
            host=platform.node(),
            process=os.getpid(),
            epoch=epoch,
            **dataclasses.asdict(resources),
        )

    def also(self, report: Report) -> Report:
        """A report that goes here and there."""

        def both(step: Step) -> None:
            self.seconds.update(step.seconds)
            values: dict[str, Any] = {"part": step.part, "text": step.text}
            if step.record is not None:
                values["size_bytes"] = step.record.size_bytes
            self._add(step.event, seconds=step.seconds, **values)
            if step.event != "resumed":
                self._write()
            report(step)

        return both

    def close(self, summary: dict[str, Any]) -> None:
        """Write the last line: what the invocation amounts to."""
        self._add("summary", summary=summary)
        self._write()

    def _add(self, event: str, **values: Any) -> None:
        time = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        known = {name: value for name, value in values.items() if value not in (None, "", {})}
        self._lines.append(json.dumps({"time": time, "event": event, **known}))

    def _write(self) -> None:
        self._store.put(self._key, ("\n".join(self._lines) + "\n").encode())


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
