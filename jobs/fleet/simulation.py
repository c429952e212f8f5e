"""A catalog's runs on so many workers, on paper: which starts when, what it waits for, how it ends.

Runs start as `quantfleet submit` starts them: whenever workers are free, the most urgent run that
they are enough for, and of equally urgent ones the first in the catalog. So no worker is idle while
a waiting run would fit, and one that needs many may be overtaken by less urgent ones that need few.

A worker fails at random, so that the time between its failures is exponential. Its run keeps its
other workers and goes on from its last committed block once the worker is back, which takes a fixed
time. What is drawn depends on the seed and the run's name alone, whatever the schedule.
"""

from __future__ import annotations

import heapq
import random
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True, kw_only=True)
class SimulatedRun:
    """One run to be made.

    Attributes:
        priority: higher ones start first.
        workers: that it takes: GPUs, or nodes of CPUs.
        seconds: that it then lasts, if nothing fails.
        lost_seconds: that each failure of one of them costs.
    """

    name: str
    workers: int
    seconds: float
    priority: int = 0
    lost_seconds: float = 0.0


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
            if found * run.lost_seconds > 100 * run.seconds:
                break  # fails faster than it works
            end += run.lost_seconds
            at += drawn.expovariate(rate)
        return found


@dataclass(frozen=True, kw_only=True)
class SimulatedEntry:
    """What became of a run.

    Attributes:
        start, end: in seconds from the beginning.
        failures: that it met.
        after: the run whose end let it start; "" where none had to end.
    """

    run: SimulatedRun
    start: float
    end: float
    failures: int = 0
    after: str = ""


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


def simulate(
    runs: Iterable[SimulatedRun],
    workers: int,
    *,
    at_once: int | None = None,
    failures: Failures | None = None,
) -> Schedule:
    """Schedule runs on so many workers.

    Args:
        runs: in the catalog's order.
        at_once: the most that are made at the same time; None for as many as fit.

    Raises:
        ValueError: a run takes no workers, more than there are, or no time that passes.
    """
    waiting = _queues(tuple(runs), workers)
    running: list[tuple[float, int, SimulatedEntry]] = []
    started: list[SimulatedEntry] = []
    free, now, after = workers, 0.0, ""
    while running or any(waiting.values()):
        while at_once is None or len(running) < at_once:
            fitting = [queue[0] for size, queue in waiting.items() if queue and size <= free]
            if not fitting:
                break
            _, run = min(fitting, key=lambda place: place[0])
            waiting[run.workers].popleft()
            met = failures.of(run) if failures is not None else 0
            end = now + run.seconds + met * run.lost_seconds
            entry = SimulatedEntry(run=run, start=now, end=end, failures=met, after=after)
            heapq.heappush(running, (end, len(started), entry))
            started.append(entry)
            free -= run.workers
        now = running[0][0]
        while running and running[0][0] == now:
            _, _, ended = heapq.heappop(running)
            free += ended.run.workers
            after = ended.run.name
    return Schedule(workers=workers, entries=tuple(started))


_Place = tuple[tuple[int, int], SimulatedRun]
"""A run after its place in the order: by priority, then as written."""


def _queues(runs: Sequence[SimulatedRun], workers: int) -> dict[int, deque[_Place]]:
    """Runs by the number of workers that they take, each queue in order."""
    queues: defaultdict[int, deque[_Place]] = defaultdict(deque)
    places = sorted(
        (((-run.priority, number), run) for number, run in enumerate(runs)),
        key=lambda place: place[0],
    )
    for place, run in places:
        if not 1 <= run.workers <= workers or not 0 <= run.seconds < float("inf"):
            raise ValueError(
                f"{run.name}: {run.workers} workers for {run.seconds} s, and there are {workers}; "
                "give it at least one, and no more than there are"
            )
        queues[run.workers].append((place, run))
    return dict(sorted(queues.items()))
