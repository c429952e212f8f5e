"""When a run's drivers worked, and where the time went, from the logs that they left."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pipeline.run.events import EVENTS_PREFIX, Event, read_events
from pipeline.storage.object_store import ObjectStore

Mark = Literal["resumed", "committed", "lost", "fewer workers", "damage found", "sealed"]
_MARKS: dict[str, Mark] = {
    "resumed": "resumed",
    "committed": "committed",
    "lost": "lost",
    "fewer": "fewer workers",
    "damaged": "damage found",
    "sealed": "sealed",
}


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Something that a driver told of.

    Attributes:
        seconds: since the run's first driver began, by the drivers' clocks.
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
        start, end: seconds since the run's first driver began.
        finished: whether it ended in order; else it was killed, or told of an error elsewhere.
        parts: how many it committed.
    """

    number: int
    start: float
    end: float
    finished: bool
    workers: int | None
    moments: tuple[Moment, ...]

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
        """Seconds of work by stage, the longest first."""
        sums: Counter[str] = Counter()
        for stages in self.seconds.values():
            sums.update(stages)
        return dict(sorted(sums.items(), key=lambda one: (-one[1], one[0])))


def read_timeline(store: ObjectStore) -> Timeline:
    """Of the run at a store's root."""
    logs = [read_events(store, [key]) for key in store.list(EVENTS_PREFIX)]
    return timeline(log for log in logs if log)


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
                    seconds=(event.time - began).total_seconds(),
                    mark=_MARKS[event.name],
                    part=part if isinstance(part, int) else None,
                    text=str(event.values.get("text", "")),
                )
            )
    workers = next((e.values.get("workers") for e in log if e.name == "started"), None)
    return Sitting(
        number=number,
        start=(log[0].time - began).total_seconds(),
        end=(log[-1].time - began).total_seconds(),
        finished=any(event.name in ("summary", "sealed") for event in log),
        workers=workers if isinstance(workers, int) else None,
        moments=tuple(moments),
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
