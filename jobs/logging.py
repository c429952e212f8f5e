"""What commands write: results on stdout, and everything else on stderr through `logging`.

People get text. Where QUANTFLEET_LOG is json, machines get one JSON object per line, with a time, a
level, an event and a message; the run, its model and its recipe while one is being worked on; and
whatever else the event is about, such as a block, a layer or seconds by stage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import re
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Literal

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.measure import Measurement
from rich.segment import Segment, Segments
from rich.spinner import Spinner
from rich.table import Column, Table
from rich.text import Text

from jobs.quantities import duration

FORMAT_VARIABLE = "QUANTFLEET_LOG"
MOST_ROWS = 1000
"""Of a table about a whole catalog: nobody reads ten thousand, which take minutes to lay out."""
LogFormat = Literal["text", "json"]

_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_PICTURES |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def visible(text: str) -> str:
    """Text in which control characters, but line feeds and tabs, are seen and do nothing.

    Names and messages may come from files of others, and a terminal obeys what it is sent.
    """
    return text.translate(_PICTURES)


class TextConsole(Console):
    """Paths and names are text, neither markup nor commands to a terminal, however spelled."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, highlight=False, **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            # Rich's own movements of the cursor are marked as such.
            shown = segment.text if segment.control else visible(segment.text)
            yield Segment(shown, segment.style, segment.control)


LOG = logging.getLogger("quantfleet")
STDERR = TextConsole(stderr=True)

_RUN: ContextVar[Mapping[str, str]] = ContextVar("run")
# Threads start with an empty context; they work for the run that the process last named.
_process_run: Mapping[str, str] = {}

_COLOURS = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_SECRET_NAME = re.compile(r"(SECRET|TOKEN|PASSWORD|ACCESS_KEY)(?!.*_(PATH|FILE)$)")
_SHORTEST_SECRET = 8
_PATIENCE_SECONDS = 3.0
"""Before anyone wonders how long something has been going on."""
_UNLIMITED = 10_000
"""Columns of what is no terminal."""


def is_json() -> bool:
    """Whether stderr is for machines."""
    return os.environ.get(FORMAT_VARIABLE) == "json"


def configure(log_format: LogFormat) -> None:
    """Set up this process's logging.

    With "json", warnings, other libraries' logs and uncaught exceptions are JSON lines as well.
    """
    LOG.setLevel(logging.INFO)
    LOG.propagate = log_format == "json"
    LOG.handlers[:] = [] if log_format == "json" else [TextHandler(STDERR)]
    if log_format == "json":
        handler = logging.StreamHandler()
        handler.setFormatter(JsonFormatter())
        logging.getLogger().handlers[:] = [handler]
        logging.captureWarnings(True)
        sys.excepthook = _log_uncaught
        threading.excepthook = lambda of: _log_uncaught(of.exc_type, of.exc_value, of.exc_traceback)


def set_run(**fields: str) -> None:
    """Name the run, model and recipe, as far as known, that all following lines are about."""
    global _process_run
    _process_run = fields
    _RUN.set(fields)


def url_name(url: str) -> str:
    """The last part of a run's or a preset's URL, by which `quantfleet status` names it."""
    return url.rstrip("/").rpartition("/")[2]


def log_event(
    event: str,
    message: str,
    values: Mapping[str, object] | None = None,
    *,
    level: int = logging.INFO,
    table: RenderableType | None = None,
) -> None:
    """Log a message with the values behind it.

    Args:
        event: what happened, in a word or two, for machines to filter by.
        message: printed as it is, never wrapped.
        values: plain JSON values, for machines; empty ones are left out.
        table: for people, in place of the message.
    """
    # `%` stays as it is: without arguments, logging does not format.
    LOG.log(level, message, extra={"event": event, "table": table, "values": values or {}})


@contextlib.contextmanager
def status(message: str) -> Iterator[None]:
    """Say what takes a while: a spinner on a terminal, an event for machines."""
    if is_json():
        log_event("began", message)
    with waiting(message):
        yield


@contextlib.contextmanager
def waiting(message: str) -> Iterator[None]:
    """Say what takes a while, on a terminal alone: a spinner, and how long it has been."""
    started = time.monotonic()
    spinner = Spinner("dots")

    def shown() -> RenderableType:
        seconds = time.monotonic() - started
        past = f"  {duration(seconds)}" if seconds >= _PATIENCE_SECONDS else ""
        spinner.update(text=Text.assemble(message, (past, "dim")))
        return spinner

    with live(shown):
        yield


@contextlib.contextmanager
def live(shown: Callable[[], RenderableType]) -> Iterator[None]:
    """Draw something at the foot of the terminal, again and again, for the block.

    What is printed meanwhile goes above it. Blocks inside each other share the foot: the outermost
    is drawn first. Nothing is drawn for machines, in files and pipes, or on a dumb terminal.
    """
    if not is_live():
        yield
        return
    with Live(get_renderable=shown, console=STDERR, transient=True):
        yield


def is_live() -> bool:
    """Whether stderr is a terminal whose foot can be drawn again."""
    return STDERR.is_terminal and not STDERR.is_dumb_terminal and not is_json()


def print_json(value: object) -> None:
    """Write a result, of plain JSON values and dataclasses, to stdout."""
    sys.stdout.write(json.dumps(value, indent=2, default=dataclasses.asdict) + "\n")


def print_json_list(values: Iterable[object]) -> None:
    """Write a list of results to stdout as `print_json` does, one of them at a time."""
    separator = "[\n"
    for value in values:
        text = json.dumps(value, indent=2, default=dataclasses.asdict)
        sys.stdout.write(separator + textwrap.indent(text, "  "))
        separator = ",\n"
    sys.stdout.write("[]\n" if separator == "[\n" else "\n]\n")


def print_result(value: object, table: RenderableType, *, as_json: bool) -> None:
    """Write a result to stdout: for machines, or for people."""
    if as_json:
        print_json(value)
    else:
        print_table(TextConsole(), table)


def print_table(console: Console, table: RenderableType) -> None:
    """Print tables so that no word, number or digest is cut or broken.

    Where a terminal is too narrow for that, its lines are too long for it. Elsewhere, in files and
    pipes, lines are as long as their content.
    """
    unlimited = console.options.update(width=_UNLIMITED)
    for part in table.renderables if isinstance(table, Group) else (table,):
        options = console.options if console.is_terminal else unlimited
        if isinstance(part, Table):
            for column in part.columns:
                cells = [Measurement.get(console, unlimited, cell) for cell in _cells(column)]
                column.min_width = max(cell.minimum for cell in cells)
                # Others give way first.
                column.no_wrap = column.min_width == max(cell.maximum for cell in cells)
            needed = Measurement.get(console, unlimited, part).minimum
            options = options.update(width=max(options.max_width, needed))
        elif isinstance(part, Text):  # a terminal wraps a path so that it can be copied
            options = unlimited
        console.print(Segments(console.render(part, options)), crop=False, end="")


def _cells(column: Column) -> Iterator[RenderableType]:
    yield column.header
    yield from column.cells


def route_to_root(library: str) -> None:
    """With JSON, take from a library the handlers with which it prints its own logs."""
    if is_json():
        logger = logging.getLogger(library)
        logger.handlers.clear()
        logger.propagate = True


class TextHandler(logging.Handler):
    """Prints messages, and tables in their place.

    Rich's own RichHandler lays records out in columns, which breaks long paths and URLs.
    """

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        table = getattr(record, "table", None)
        if table is not None:
            print_table(self._console, table)
        elif message := record.getMessage():
            self._console.print(message, soft_wrap=True, markup=False, highlight=False)


class JsonFormatter(logging.Formatter):
    """One JSON object per record."""

    def format(self, record: logging.LogRecord) -> str:
        level = "info"
        if record.levelno >= logging.WARNING:
            level = "error" if record.levelno >= logging.ERROR else "warning"
        message = record.getMessage()
        event = getattr(record, "event", None)
        if event is None:  # another library's
            event, message = "log", " ".join(message.split())
            values: dict[str, object] = {"logger": record.name}
            if record.exc_info:
                values["traceback"] = self.formatException(record.exc_info)
        else:
            values = getattr(record, "values", {})
        line = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "level": level,
            "event": event.replace(" ", "_"),
            **_RUN.get(_process_run),
            **values,
            "message": _COLOURS.sub("", message),
        }
        known = {name: value for name, value in line.items() if value not in (None, "", {}, [])}
        return _without_secrets(json.dumps(known, default=str))


def _log_uncaught(
    error_type: type[BaseException], error: BaseException | None, trace: TracebackType | None
) -> None:
    lines = "".join(traceback.format_exception(error_type, error, trace))
    message = f"{error_type.__name__}: {' '.join(str(error or '').split())}"
    log_event("fault", message, {"traceback": lines}, level=logging.ERROR)


def _without_secrets(line: str) -> str:
    """Our own messages name no secret, but a library's may quote what it was given."""
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET:
            line = line.replace(json.dumps(value)[1:-1], "…")
    return line
