"""What a terminal shows of a run: how far it is, what workers do, how long it will take."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.text import Text

from jobs.progress.bar import HowFar
from jobs.progress.time_left import Expected, seconds_a_block, seconds_left
from jobs.quantities import duration
from pipeline.executor.work_spans import Doing
from pipeline.plan import Plan
from pipeline.run.events import Step

_MOST_WORKERS = 8
"""With a line each."""
_MISHAPS = {
    "lost": "workers lost",
    "damaged": "damaged objects made again",
    "fewer": "went on with fewer workers",
}


@dataclass(kw_only=True)
class RunView:
    """One run, as its driver's steps and its workers tell it; drawn from another thread.

    Attributes:
        num_workers: that it was given.
        clock: seconds, as `time.monotonic`.
        expected: what the cost model says, once that is known.
        doing: what workers do, by number, by their latest answers.
        resumed: parts that were committed before.
        measured: seconds of each part committed here, since the one before.
        mishaps: how often each kind happened.
    """

    plan: Plan
    num_workers: int
    clock: Callable[[], float] = time.monotonic
    expected: Expected | None = None
    doing: Mapping[int, Doing] = field(default_factory=dict)
    resumed: frozenset[int] = frozenset()
    measured: dict[int, float] = field(default_factory=dict)
    mishaps: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._started = self._last = self.clock()
        self._lock = threading.Lock()
        self._answered: set[int] = set()

    def report(self, step: Step) -> None:
        """Take in what the driver reports."""
        with self._lock:
            if step.event == "resumed":
                self.resumed = frozenset(step.parts) - self.measured.keys()
            if step.event == "committed" and step.part is not None:
                now = self.clock()
                self.measured[step.part] = now - self._last
                self._last = now
            if step.event in _MISHAPS:
                self.mishaps[step.event] += 1

    def hear(self, doing: Mapping[int, Doing]) -> None:
        """Take in what the workers answer."""
        with self._lock:
            self.doing = doing
            self._answered.update(doing)

    def __rich__(self) -> RenderableType:
        with self._lock:
            lines = [*self._head(), self._pace(), *self._workers(), *self._past()]
        for line in lines:
            if isinstance(line, Text):
                line.no_wrap, line.overflow = True, "ellipsis"
        return Group(*lines)

    @property
    def _missing(self) -> Sequence[int]:
        done = self.resumed | self.measured.keys()
        return [part for part in self.plan.due_parts if part not in done]

    def _head(self) -> Sequence[RenderableType]:
        """What is made, and how much of it there is."""
        total = len(self.plan.due_parts)
        done = total - len(self._missing)
        name = Text.assemble((self.plan.model, "bold"), f" × {self.plan.recipe.name}")
        return [HowFar(name, done, total, "parts")]

    def _pace(self) -> Text:
        now = self.clock()
        missing = self._missing
        told = [f"{duration(now - self._started)} so far"]
        pace = seconds_a_block(self.measured)
        if pace is not None:
            told.append(f"{duration(pace)} a block")
        left = None
        if self.expected is not None:
            left = seconds_left(self.expected, self.measured, missing, now - self._last)
        if left is not None:
            by = "" if any(self.measured) else ", by the cost model alone"
            told.append(f"about {duration(left)} left{by}")
        elif missing:
            told.append("time left: known after a block")
        stage = "reads all files once more, then seals"
        if missing:
            stage = self.plan.parts[missing[0]].name
        return Text.assemble(stage, ("  " + " · ".join(told), "dim"))

    def _workers(self) -> Sequence[Text]:
        if self.num_workers > _MOST_WORKERS:
            found = Counter(self._at_work(number)[0] for number in range(self.num_workers))
            most = " · ".join(f"{name} {count}" for name, count in found.most_common())
            compiling = sum(1 for one in self.doing.values() if one.compiling)
            more = f" · of which {compiling} compile" if compiling else ""
            return [Text.assemble((f"{self.num_workers} workers  ", "dim"), f"{most}{more}")]
        lines = []
        for number in range(self.num_workers):
            stage, more = self._at_work(number)
            lines.append(Text.assemble((f"worker {number}  ", "dim"), stage, (more, "dim")))
        return lines

    def _at_work(self, number: int) -> tuple[str, str]:
        """What a worker does first of all, and what else there is to say of it."""
        doing = self.doing.get(number)
        if doing is None:
            has_answered = number in self._answered
            return ("no answer", "") if has_answered else ("starting", ", importing Keras")
        calls = [(name.replace("_", " "), seconds) for name, seconds in doing.calls]
        # What computes is told first; what reads and commits goes on beside it.
        calls.sort(key=lambda call: call[0] in ("read", "commit", "commit sums", "settle"))
        if not calls:
            return "waiting", ""
        (first, seconds), *beside = calls
        more = f" {duration(seconds)}"
        if doing.compiling:
            more += f", compiling {doing.compiling} program{'s' * (doing.compiling > 1)}"
        more += "".join(f" · {name}" for name, _ in beside)
        return first, more

    def _past(self) -> Sequence[Text]:
        told = [f"{_MISHAPS[name]}: {count}" for name, count in self.mishaps.items()]
        if self.resumed:
            told.insert(0, f"committed before: {len(self.resumed)}")
        return [Text(" · ".join(told), style="yellow")] if told else []
