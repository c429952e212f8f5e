"""A catalog's runs on so many workers, on paper: which starts when, what it waits for, how it ends.

Runs are started as `quantfleet submit --wait` starts them (`to_start`, which it uses too): in the
catalog's order, the most urgent first, as many at a time as it is told, whether workers are free or
not; that one has ended is seen when the jobs are polled next. `nightly` is the same with one at a
time. A run that was started waits for its workers, as Ray lets it: whenever some are free, the
first that they are enough for gets them. So one that needs many may be overtaken by others that
need few, and keeps its place among those that are started meanwhile.

A worker fails at random, so that the time between its failures is exponential. Its run keeps its
other workers and goes on from its last committed block once the worker is back, which takes a fixed
time. What is drawn depends on the seed and the run's name alone, whatever the schedule.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

_MOST_LOST = 100
"""Of a run's own time, to failures; one that loses more is not followed to its end."""


@dataclass(frozen=True, kw_only=True)
class SimulatedRun:
    """One run to be made.

    Attributes:
        priority: higher ones start first.
        workers: that it takes: GPUs, or nodes of CPUs.
        seconds: that it then lasts, if nothing fails.
        lost_seconds: that each failure of one of them costs.
        after: names of runs; it is not started before those of them that are made have ended.
    """

    name: str
    workers: int
    seconds: float
    priority: int = 0
    lost_seconds: float = 0.0
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failures:
    """How workers fail.

    Attributes:
        mean_seconds: between failures of one worker.
        seed: for other draws.
    """

    mean_seconds: float
    seed: int = 0

    def of(self, run: SimulatedRun) -> int:
        """How many a run meets; those in the time that is lost to others count too."""
        drawn = random.Random(f"{self.seed} {run.name}")
        rate = run.workers / self.mean_seconds
        found, at, end = 0, drawn.expovariate(rate), run.seconds
        while at < end:
            found += 1
            if _loses_too_much(run, found):
                break
            end += run.lost_seconds
            at += drawn.expovariate(rate)
        return found


def _loses_too_much(run: SimulatedRun, failures: int) -> bool:
    """Whether a run fails faster than it works, so that more of its failures are not drawn."""
    return failures * run.lost_seconds > _MOST_LOST * run.seconds


@dataclass(frozen=True, kw_only=True)
class SimulatedEntry:
    """What became of a run.

    Attributes:
        submitted: when it was started, to wait for its workers; in seconds from the beginning.
        start, end: when it got them, and gave them back.
        failures: that it met.
        after: the run whose end let it start; "" where none had to end.
    """

    run: SimulatedRun
    submitted: float = 0.0
    start: float
    end: float
    failures: int = 0
    after: str = ""

    @property
    def never_ends(self) -> bool:
        """Whether it fails faster than it works: more often than this, and it would hardly end."""
        return _loses_too_much(self.run, self.failures)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """All runs, in the order in which they start.

    Attributes:
        workers: that there are.
    """

    workers: int
    entries: tuple[SimulatedEntry, ...]

    @cached_property
    def makespan(self) -> float:
        """Seconds until the last run ends."""
        return max((entry.end for entry in self.entries), default=0.0)

    @property
    def worker_seconds(self) -> float:
        """That runs hold workers."""
        return sum(one.run.workers * (one.end - one.start) for one in self.entries)

    @property
    def utilisation(self) -> float:
        """The share of all workers' time until the end that runs hold them."""
        whole = self.workers * self.makespan
        return self.worker_seconds / whole if whole else 1.0

    @property
    def mean_wait(self) -> float:
        """Seconds until a run starts, on average."""
        return sum(entry.start for entry in self.entries) / max(len(self.entries), 1)

    @property
    def failures(self) -> int:
        """Of all workers."""
        return sum(entry.failures for entry in self.entries)


_T = TypeVar("_T")


def to_start(waiting: Iterable[_T], alive: int, at_once: int | None) -> list[_T]:
    """Which of the waiting runs, in their order, are started now.

    Args:
        alive: how many have been started, and have not ended.
        at_once: the most that may be; None for any number.
    """
    return list(itertools.islice(waiting, None if at_once is None else max(0, at_once - alive)))


def simulate(
    runs: Iterable[SimulatedRun],
    workers: int,
    *,
    at_once: int | None = None,
    poll_seconds: float = 0.0,
    failures: Failures | None = None,
) -> Schedule:
    """Schedule runs on so many workers.

    Args:
        runs: in the catalog's order.
        at_once: the most that are started and have not ended; None for all.
        poll_seconds: between two looks at which have ended; 0 if that is seen at once.

    Raises:
        ValueError: a run takes no workers, more than there are, or no time that passes.
    """
    waiting = dict(enumerate(_in_order(runs, workers)))
    unfinished = {run.name for run in waiting.values()}
    started = _Started()
    running: list[tuple[float, int, SimulatedEntry]] = []
    entries: list[SimulatedEntry] = []
    free, now, after = workers, 0.0, ""
    poll: float | None = 0.0
    while True:
        if poll is not None and poll <= now:
            ready = (one for one in waiting.items() if unfinished.isdisjoint(one[1].after))
            for number, run in to_start(ready, len(running) + len(started), at_once):
                started.add(now, run)
                del waiting[number]
            poll = None
        while found := started.take(free):
            submitted, run = found
            met = failures.of(run) if failures is not None else 0
            entry = SimulatedEntry(
                run=run,
                submitted=submitted,
                start=now,
                end=now + run.seconds + met * run.lost_seconds,
                failures=met,
                after=after,
            )
            heapq.heappush(running, (entry.end, len(entries), entry))
            entries.append(entry)
            free -= run.workers
        if not running and poll is None:
            return Schedule(workers=workers, entries=tuple(entries))
        end = running[0][0] if running else math.inf
        if poll is not None and poll < end:
            now = poll
            continue
        now = end
        while running and running[0][0] == now:
            _, _, ended = heapq.heappop(running)
            free += ended.run.workers
            after = ended.run.name
            unfinished.discard(after)
        if poll is None:
            poll = math.ceil(now / poll_seconds) * poll_seconds if poll_seconds else now


class _Started:
    """Runs that were started and wait for workers."""

    def __init__(self) -> None:
        self._queues: dict[int, deque[tuple[int, float, SimulatedRun]]] = {}
        self._number = 0
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def add(self, now: float, run: SimulatedRun) -> None:
        self._queues.setdefault(run.workers, deque()).append((self._number, now, run))
        self._number += 1
        self._length += 1

    def take(self, free: int) -> tuple[float, SimulatedRun] | None:
        """The first that so many workers are enough for, after when it was started."""
        heads = [queue[0] for size, queue in self._queues.items() if queue and size <= free]
        if not heads:
            return None
        _, submitted, run = min(heads, key=lambda head: head[0])
        self._queues[run.workers].popleft()
        self._length -= 1
        return submitted, run


def _in_order(runs: Iterable[SimulatedRun], workers: int) -> list[SimulatedRun]:
    """By priority, and then as written."""
    found = sorted(runs, key=lambda run: -run.priority)
    for run in found:
        if not 1 <= run.workers <= workers or not 0 <= run.seconds < math.inf:
            raise ValueError(
                f"{run.name}: {run.workers} workers for {run.seconds} s, and there are {workers}; "
                "give it at least one, and no more than there are"
            )
    return found
