"""What happens in a run: what its driver reports, the log of it in storage, and reading that log.

Events are for people; nothing in a run's result depends on them. Every driver writes a file of its
own below `events/`, with one JSON object per line.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from pipeline.errors import DamagedObjectError, MissingObjectError
from pipeline.executor.protocol import Allocation
from pipeline.executor.work_spans import WorkSpan, coarse, seconds_by_stage
from pipeline.plan import Plan
from pipeline.run.code_histograms import CodeHistogram
from pipeline.run.records import CommittedRecord
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.record import adapter_of

EVENTS_PREFIX = "events/"
_MAX_BYTES = 64 << 20
_MOST_SPANS = 2000
"""Of work in one event, since a driver writes all of its log with every part."""

StepEvent: TypeAlias = Literal["damaged", "resumed", "committed", "kept", "lost", "fewer", "sealed"]
"""Damaged objects found; committed parts found; a part committed; activations stored; a worker
lost; fewer workers than before; the manifest written."""
EventName: TypeAlias = StepEvent | Literal["started", "summary", "totals"]
_MISHAPS = {"resumed", "damaged", "lost", "fewer"}
_LAST_BYTES = 64 << 10
"""Of a log, in which its totals are."""
_NAMES = frozenset(name for names in get_args(EventName) for name in get_args(names))


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a driver reports.

    Attributes:
        parts: those that a resumed run found committed.
        work: of all workers, on the part, or since the last report.
        histograms: of the part's layers, by path.
    """

    event: StepEvent
    part: int | None = None
    parts: tuple[int, ...] = ()
    record: CommittedRecord | None = None
    work: Sequence[WorkSpan] = ()
    text: str = ""
    histograms: Mapping[str, CodeHistogram] = field(default_factory=dict)

    @property
    def seconds(self) -> dict[str, float]:
        """Of work by stage, all workers together."""
        return seconds_by_stage(self.work)


Report: TypeAlias = Callable[[Step], None]


class EventLog:
    """Collects one driver's events, and writes them whenever a part is committed.

    Attributes:
        seconds: of work by stage, all workers together.
    """

    def __init__(
        self, store: ObjectStore, plan: Plan, allocation: Allocation, epoch: int | None = None
    ) -> None:
        """Args: epoch: of the driver's lease; None if the run is finished and needs no driver."""
        self._store = store
        self._key = f"{EVENTS_PREFIX}{_now():%Y%m%dT%H%M%S}-{secrets.token_hex(4)}.jsonl"
        self._lines: list[str] = []
        self._started = time.time()
        self._counts: Counter[str] = Counter()
        self._times: dict[EventName, datetime.datetime] = {}
        self._captured_seconds = 0.0
        self._allocation = allocation.to_dict()
        self.seconds: Counter[str] = Counter()
        self._add(
            "started",
            plan_digest=plan.digest,
            host=platform.node(),
            process=os.getpid(),
            epoch=epoch,
            **self._allocation,
        )

    def also(self, report: Report) -> Report:
        """A report function that logs each step before it passes it on to `report`."""

        def both(step: Step) -> None:
            self.seconds.update(step.seconds)
            size_bytes = None if step.record is None else step.record.size_bytes
            self._add(
                step.event,
                seconds=step.seconds,
                part=step.part,
                text=step.text,
                size_bytes=size_bytes,
                work=self._spans(step.work),
                histograms={path: one.to_dict() for path, one in step.histograms.items()},
            )
            if step.event != "resumed":
                self._write()
            report(step)

        return both

    def captured(self, seconds: float) -> None:
        """Take note of time in which this driver made statistics, whose log is another."""
        self._captured_seconds += seconds

    def close(self, summary: dict[str, Any], work: Sequence[WorkSpan] = ()) -> None:
        """Write the last lines: the summary, and totals that are read without all the others.

        Args:
            work: that was done after the manifest.
        """
        self._add("summary", summary=summary, work=self._spans(work))
        if "sealed" in self._times:
            passed = (self._times["sealed"] - self._times["started"]).total_seconds()
            totals = RunTotals(
                seconds=passed - self._captured_seconds,
                captured_seconds=self._captured_seconds,
                work_seconds=dict(self.seconds),
                events=dict(self._counts),
                allocation=self._allocation,
            )
            self._add("totals", totals=dataclasses.asdict(totals))
        self._write()

    def _spans(self, work: Sequence[WorkSpan]) -> dict[str, list[list[float]]]:
        """By stage: worker, start in seconds since this log's, and seconds until its end."""
        found: dict[str, list[list[float]]] = {}
        for one in coarse(work, _MOST_SPANS):
            start, took = one.start - self._started, one.end - one.start
            found.setdefault(one.stage, []).append([one.worker, round(start, 3), round(took, 3)])
        return found

    def _add(self, event: EventName, **values: Any) -> None:
        given = {name: value for name, value in values.items() if value not in (None, "", {})}
        time = _now().isoformat(timespec="milliseconds")
        self._counts[event] += 1
        self._times[event] = datetime.datetime.fromisoformat(time)
        self._lines.append(json.dumps({"time": time, "event": event, **given}))

    def _write(self) -> None:
        self._store.put(self._key, ("\n".join(self._lines) + "\n").encode())


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


@dataclass(frozen=True, kw_only=True)
class RunTotals:
    """What one driver took from a run's claim to its manifest.

    Attributes:
        seconds: without those in which it made statistics.
        captured_seconds: in which it did.
        work_seconds: of work by stage, all workers together; statistics among it.
        events: how many of each name.
        allocation: the workers that it had.
    """

    seconds: float
    captured_seconds: float
    work_seconds: dict[str, float]
    events: dict[str, int]
    allocation: dict[str, int | str]

    @property
    def is_whole(self) -> bool:
        """Whether the driver made all of the run, without a mishap."""
        return "committed" in self.events and not _MISHAPS & self.events.keys()


@dataclass(frozen=True, kw_only=True)
class Event:
    """One line of a log; its time is by the driver's clock."""

    time: datetime.datetime
    name: EventName
    values: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"time": self.time.isoformat(), "event": self.name, **self.values}

    def line(self) -> str:
        """One line for people."""
        values = {
            name: value for name, value in self.values.items() if name not in ("work", "histograms")
        }
        text = values.pop("text", "")
        for stage, spent in values.pop("seconds", {}).items():
            values[f"{stage}_seconds"] = round(spent, 2)
        if isinstance(summary := values.pop("summary", None), dict):
            values |= {name: summary.get(name) for name in ("stored_bytes", "wall_seconds")}
        rest = " ".join(f"{name}={json.dumps(value)}" for name, value in values.items())
        stamp = self.time.isoformat(timespec="seconds")
        return " ".join(filter(None, (stamp, self.name, text, rest)))


def read_events(store: ObjectStore, keys: Sequence[str] | None = None) -> tuple[Event, ...]:
    """All events of the run at the store's root, by time; lines that are no event are left out.

    Args:
        keys: of the files to read; None for all.
    """
    events: list[Event] = []
    for key in store.list(EVENTS_PREFIX) if keys is None else keys:
        try:
            content = store.get(key, at_most=_MAX_BYTES)
        except (MissingObjectError, DamagedObjectError):
            continue
        for line in content.decode("utf-8", "replace").splitlines():
            try:
                values = json.loads(line)
                time = datetime.datetime.fromisoformat(values.pop("time"))
                name = values.pop("event")
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue
            if time.tzinfo and name in _NAMES and isinstance(values.get("seconds", {}), dict):
                events.append(Event(time=time, name=name, values=values))
    return tuple(sorted(events, key=lambda event: event.time))


def read_totals(store: ObjectStore) -> RunTotals | None:
    """Those of the latest driver of the run at the store's root that finished it.

    Of each log only the end is read. None if no driver left any, as those of older versions.
    """
    sizes = {key: one.size_bytes for key, one in store.versions(EVENTS_PREFIX).items()}
    for key, size in sorted(sizes.items(), reverse=True):
        try:
            end = store.get_range(key, max(0, size - _LAST_BYTES), size)
        except (MissingObjectError, DamagedObjectError):
            continue  # swept or written again meanwhile
        lines = end.decode("utf-8", "replace").splitlines()
        try:
            values = json.loads(lines[-1])["totals"]
            totals: RunTotals = adapter_of(RunTotals).validate_python(values)
        except (IndexError, KeyError, TypeError, ValueError, RecursionError):
            continue
        return totals
    return None


def seconds_per_part(events: Sequence[Event]) -> float | None:
    """A driver's average between its start and its latest part; None before its first."""
    committed = [event for event in events if event.name == "committed"]
    if not committed:
        return None
    elapsed = (committed[-1].time - events[0].time).total_seconds()
    return max(elapsed, 0.0) / len(committed)
