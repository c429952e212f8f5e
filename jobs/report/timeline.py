"""When a run's drivers worked, and where the time went, from the logs that they left."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from pipeline.executor.work_spans import WorkSpan
from pipeline.run.events import EVENTS_PREFIX, Event, read_events
from pipeline.storage.object_store import ObjectStore

Mark = Literal[
    "resumed", "committed", "worker lost", "fewer workers", "damage found", "finished", "stopped"
]
_MARKS: dict[str, Mark] = {
    "resumed": "resumed",
    "committed": "committed",
    "lost": "worker lost",
    "fewer": "fewer workers",
    "damaged": "damage found",
    "sealed": "finished",
}
_MOST = 1e12
"""Seconds that a number of a log may say."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Something that a driver told of.

    Attributes:
        seconds: since its driver began, by that one's clock.
        part: what it is about; None for the run.
    """

    seconds: float
    mark: Mark
    part: int | None
    text: str


@dataclass(frozen=True, kw_only=True)
class Sitting:
    """One driver, from its first to its last word.

    Attributes:
        number: from 1, in the order in which they began.
        start, end: seconds since the run's first driver began; if it did not end in order, its
            last mark says that it stopped.
        finished: whether it ended in order; else it was killed, or told of an error elsewhere.
        parts: how many it committed.
        work: of its workers, by seconds since it began, and by their machines' clocks.
    """

    number: int
    start: float
    end: float
    finished: bool
    workers: int | None
    moments: tuple[Moment, ...]
    work: tuple[WorkSpan, ...] = ()

    @property
    def parts(self) -> int:
        return sum(1 for one in self.moments if one.mark == "committed")


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """All of a run's drivers.

    Attributes:
        began: when the first of them did, UTC; None if no log is left.
        seconds: of work by stage and part, all workers together; part None is the rest.
    """

    began: datetime.datetime | None
    sittings: tuple[Sitting, ...]
    seconds: dict[int | None, dict[str, float]]

    @property
    def by_stage(self) -> dict[str, float]:
        """Seconds of work on parts by stage, the longest first."""
        sums: Counter[str] = Counter()
        for stages in self.seconds.values():
            sums.update(stages)
        return dict(sorted(sums.items(), key=lambda one: (-one[1], one[0])))

    @property
    def shares(self) -> list[tuple[str, float]]:
        """The stages that took at least a hundredth of the work, and what share."""
        whole = sum(self.by_stage.values())
        return [
            (stage.replace("_", " "), spent / whole)
            for stage, spent in self.by_stage.items()
            if spent > 0.01 * whole
        ]


def read_logs(store: ObjectStore) -> list[tuple[Event, ...]]:
    """Those of each driver of the run at a store's root, but for empty ones."""
    logs = [read_events(store, [key]) for key in store.list(EVENTS_PREFIX)]
    return [log for log in logs if log]


def timeline(logs: Iterable[tuple[Event, ...]]) -> Timeline:
    """Args: logs: of each driver, by time and not empty."""
    ordered = sorted(logs, key=lambda log: log[0].time)
    # A driver that found nothing to do tells of no work.
    worked = [log for log in ordered if any(event.name in _MARKS for event in log)]
    if not worked:
        return Timeline(began=None, sittings=(), seconds={})
    began = worked[0][0].time
    seconds: dict[int | None, Counter[str]] = {}
    for event in (event for log in worked for event in log):
        stages = event.values.get("seconds", {})
        part = event.values.get("part")
        of_part = seconds.setdefault(part if isinstance(part, int) else None, Counter())
        of_part.update({name: float(spent) for name, spent in stages.items() if _is_number(spent)})
    return Timeline(
        began=began,
        sittings=tuple(_sitting(i, log, began) for i, log in enumerate(worked, start=1)),
        seconds={part: dict(stages) for part, stages in seconds.items() if stages},
    )


def _sitting(number: int, log: tuple[Event, ...], began: datetime.datetime) -> Sitting:
    moments = []
    for event in log:
        if event.name in _MARKS:
            part = event.values.get("part")
            moments.append(
                Moment(
                    seconds=(event.time - log[0].time).total_seconds(),
                    mark=_MARKS[event.name],
                    part=part if isinstance(part, int) else None,
                    text=str(event.values.get("text", "")),
                )
            )
    finished = any(event.name in ("summary", "sealed") for event in log)
    end = (log[-1].time - log[0].time).total_seconds()
    if not finished:
        moments.append(Moment(seconds=end, mark="stopped", part=None, text=""))
    workers = next((e.values.get("workers") for e in log if e.name == "started"), None)
    return Sitting(
        number=number,
        start=(log[0].time - began).total_seconds(),
        end=(log[-1].time - began).total_seconds(),
        finished=finished,
        workers=workers if isinstance(workers, int) else None,
        moments=tuple(moments),
        work=tuple(span for event in log for span in _work(event)),
    )


def _work(event: Event) -> Iterator[WorkSpan]:
    """The spans of an event that are well formed."""
    by_stage = event.values.get("work")
    for stage, spans in by_stage.items() if isinstance(by_stage, dict) else ():
        for value in spans if isinstance(spans, list) else ():
            span = _span(stage, value)
            if span is not None:
                yield span


def _is_number(value: object) -> bool:
    """Not infinite either, nor NaN: JSON has no place for them."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MOST


def _span(stage: str, value: object) -> WorkSpan | None:
    if not (isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))):
        return None
    worker, start, took = value
    return WorkSpan(
        stage=stage, worker=int(worker), start=start, end=start + max(took, 0), seconds=took
    )
