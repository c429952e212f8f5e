"""What a terminal shows of a catalog: how many entries are done, and what became of the others."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from jobs.logging import live
from jobs.progress.bar import HowFar
from jobs.quantities import duration

EntryPhase = Literal["done", "running", "waiting", "failed"]
_PHASES: tuple[EntryPhase, ...] = get_args(EntryPhase)
_MOST_PRIORITIES = 6
_MOST_NAMED = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class EntryProgress:
    """How far one model × recipe is.

    Attributes:
        priority: of its entry in the catalog; higher ones come first.
        text: more, in words.
    """

    name: str
    priority: int
    phase: EntryPhase = "waiting"
    text: str = ""


ShowEntry = Callable[[EntryProgress], None]


class CatalogView:
    """All entries of a catalog; drawn from another thread."""

    def __init__(
        self, entries: Sequence[EntryProgress], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Args: clock: seconds."""
        self._clock = clock
        self._lock = threading.Lock()
        self._entries = {entry.name: entry for entry in entries}
        self._since: Mapping[str, float] = {}

    def show(self, entry: EntryProgress) -> None:
        """Take in how far an entry is now."""
        with self._lock:
            since = {k: v for k, v in self._since.items() if k != entry.name}
            if entry.phase == "running":
                since[entry.name] = self._since.get(entry.name, self._clock())
            self._since = since
            self._entries[entry.name] = entry

    def __rich__(self) -> RenderableType:
        with self._lock:
            entries, since = tuple(self._entries.values()), self._since
        running = _running(entries, since, self._clock())
        return Group(_head(entries), *_by_priority(entries), *running, *_failed(entries))


@contextlib.contextmanager
def watch_catalog(entries: Sequence[EntryProgress]) -> Iterator[ShowEntry]:
    """Yield what shows how far entries are, on a terminal alone."""
    view = CatalogView(entries)
    with live(lambda: view):
        yield view.show


def _head(entries: Sequence[EntryProgress]) -> RenderableType:
    counts = Counter(entry.phase for entry in entries)
    over = counts["done"] + counts["failed"]
    told = " · ".join(f"{counts[phase]} {phase}" for phase in _PHASES if counts[phase])
    line = HowFar(Text("catalog", style="bold"), over, len(entries), "entries")
    return Group(line, _line((told, "dim")))


def _by_priority(entries: Sequence[EntryProgress]) -> Sequence[RenderableType]:
    """A line for each priority, the highest first, where entries have several."""
    counts: dict[int, Counter[EntryPhase]] = {}
    for entry in entries:
        counts.setdefault(entry.priority, Counter())[entry.phase] += 1
    if len(counts) < 2:
        return []
    columns = (Column(phase, justify="right") for phase in _PHASES)
    table = Table(Column("priority", justify="right"), *columns, box=None, header_style="dim")
    ordered = sorted(counts, reverse=True)
    for priority in ordered[:_MOST_PRIORITIES]:
        table.add_row(str(priority), *(str(counts[priority][phase] or "") for phase in _PHASES))
    if others := ordered[_MOST_PRIORITIES:]:
        rest = sum((counts[priority] for priority in others), Counter[EntryPhase]())
        table.add_row("lower", *(str(rest[phase] or "") for phase in _PHASES))
    return [table]


def _running(
    entries: Sequence[EntryProgress], since: Mapping[str, float], now: float
) -> Iterator[Text]:
    found = [entry for entry in entries if entry.phase == "running"]
    for entry in found[:_MOST_NAMED]:
        passed = duration(now - since.get(entry.name, now))
        more = f"  {passed}" + (f" · {entry.text}" if entry.text else "")
        yield _line("running  ", entry.name, (more, "dim"))
    yield from _more(found)


def _failed(entries: Sequence[EntryProgress]) -> Iterator[Text]:
    found = [entry for entry in entries if entry.phase == "failed"]
    for entry in found[:_MOST_NAMED]:
        yield _line(("failed   ", "red"), entry.name, (f"  {entry.text}", "dim"))
    yield from _more(found)


def _more(found: Sequence[EntryProgress]) -> Iterator[Text]:
    if len(found) > _MOST_NAMED:
        yield _line(f"         and {len(found) - _MOST_NAMED} more")


def _line(*parts: str | tuple[str, str]) -> Text:
    text = Text.assemble(*parts)
    text.no_wrap, text.overflow = True, "ellipsis"
    return text
