"""What workers do, and when they did what: the spans of time that their calls took."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from pipeline.compilation import num_compiling

_SHARE = 0.005
"""Of the time that spans cover: pauses this short are not told from work."""


@dataclass(frozen=True, kw_only=True)
class WorkSpan:
    """One call of a worker's method, or several with hardly a pause between them.

    Attributes:
        stage: the method.
        worker: its number in its executor, which stays the same when others are lost.
        start, end: seconds since 1970, by the clock of the worker's machine.
        seconds: of work, without the pauses.
    """

    stage: str
    worker: int = 0
    start: float
    end: float
    seconds: float


def seconds_by_stage(spans: Iterable[WorkSpan]) -> dict[str, float]:
    """Seconds of work by stage, all workers together."""
    total: Counter[str] = Counter()
    for span in spans:
        total[span.stage] += span.seconds  # type: ignore[assignment]
    return dict(total)


def coarse(spans: Iterable[WorkSpan], most: int) -> tuple[WorkSpan, ...]:
    """The same work in fewer spans, by start: one worker's in one stage, joined over short pauses.

    Args:
        most: pauses of growing length are joined over until no more are left than this, or one for
            each worker and stage.
    """
    ordered = sorted(spans, key=lambda one: (one.worker, one.stage, one.start, one.end))
    if not ordered:
        return ()
    whole = max(one.end for one in ordered) - min(one.start for one in ordered)
    pause = whole * _SHARE
    found = _joined(ordered, pause)
    while len(found) > most and pause < whole:
        pause *= 2
        found = _joined(found, pause)
    return tuple(sorted(found, key=lambda one: (one.start, one.worker, one.stage)))


def _joined(ordered: Iterable[WorkSpan], pause: float) -> list[WorkSpan]:
    found: list[WorkSpan] = []
    for span in ordered:
        last = found[-1] if found else None
        same = last is not None and (last.worker, last.stage) == (span.worker, span.stage)
        if last is not None and same and span.start - last.end <= pause:
            found[-1] = replace(
                last, end=max(last.end, span.end), seconds=last.seconds + span.seconds
            )
        else:
            found.append(span)
    return found


@dataclass(frozen=True, kw_only=True)
class Doing:
    """What a worker does at a moment.

    Attributes:
        calls: of its methods, by name, with the seconds since each began; the oldest first.
        compiling: programs that its process compiles for them.
    """

    calls: tuple[tuple[str, float], ...] = ()
    compiling: int = 0


class TimedWorker:
    """Calls a worker's methods by name and remembers when, from several threads."""

    def __init__(self, worker: object) -> None:
        self._worker = worker
        self._lock = threading.Lock()
        self._spans: list[WorkSpan] = []
        self._under_way: list[tuple[str, float]] = []

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        started = time.time()
        start = time.perf_counter()
        with self._lock:
            self._under_way.append((method, start))
        try:
            return getattr(self._worker, method)(*args, **kwargs)
        finally:
            seconds = time.perf_counter() - start
            span = WorkSpan(stage=method, start=started, end=started + seconds, seconds=seconds)
            with self._lock:
                self._spans.append(span)
                self._under_way.remove((method, start))

    def take_work(self) -> list[WorkSpan]:
        """What was done since the last call."""
        with self._lock:
            taken, self._spans = self._spans, []
        return taken

    def doing(self) -> Doing:
        """What is under way, asked from another thread."""
        with self._lock:
            calls = tuple(self._under_way)
        now = time.perf_counter()
        return Doing(
            calls=tuple((method, now - start) for method, start in calls),
            compiling=num_compiling(),
        )
