"""What is told on stderr: text for people or, where QUANTFLEET_LOG is json, an object a line.

Each object has a time, a level, an event and, in words, a message; the run, its model and its
recipe where one is at work; and whatever else the event is about, such as a block, a layer or
seconds by stage.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import re
import sys
import threading
import traceback
from types import TracebackType
from typing import Any, Literal, TextIO

from rich.console import Console, RenderableType
from rich.status import Status

FORMAT_VARIABLE = "QUANTFLEET_LOG"

Level = Literal["info", "warning", "error"]

# Of the whole process, since a command works on one run at a time, and threads work on it as well.
_RUN: dict[str, str] = {}
_COLOURS = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_SECRET_NAME = re.compile(r"(SECRET|TOKEN|PASSWORD|ACCESS_KEY)(?!.*_(PATH|FILE)$)")
_SHORTEST_SECRET = 8


def is_json() -> bool:
    """Whether machines read what is told."""
    return os.environ.get(FORMAT_VARIABLE) == "json"


def concern(**run: str) -> None:
    """Let all lines from now on name this run, instead of the one before; none without arguments.

    Args:
        run: "run", "model" and "recipe", as far as they are known.
    """
    _RUN.clear()
    _RUN.update(run)


def name_of(url: str) -> str:
    """A run, or a preset, in a word: the last of its URL, as `quantfleet status` shows it."""
    return url.rstrip("/").rpartition("/")[2]


def tell(
    console: Console,
    event: str,
    shown: RenderableType,
    *,
    level: Level = "info",
    **values: object,
) -> None:
    """Tell people `shown`, and machines the same in words with the values that are behind it.

    Args:
        shown: a line, which is left whole and as it is; of a table, machines get the values alone.
        values: plain JSON values; None is left out.
    """
    if isinstance(console, JsonConsole):
        message = shown if isinstance(shown, str) else ""
        console.file.write(_line(event, message, level, values))
        console.file.flush()
    elif isinstance(shown, str):
        console.print(shown, soft_wrap=True, markup=False, highlight=False)
    else:
        console.print(shown)


class JsonConsole(Console):
    """Looks to its users like any console, and prints objects."""

    def __init__(self, file: TextIO | None = None) -> None:
        """Args: file: None for stderr, whatever that is when something is printed."""
        super().__init__(
            file=file, stderr=file is None, force_terminal=False, color_system=None, width=200
        )

    def print(self, *objects: Any, **_options: Any) -> None:
        texts = []
        for shown in objects:
            with self.capture() as captured:
                super().print(shown, soft_wrap=True, markup=False, highlight=False)
            texts.append(captured.get().rstrip("\n"))
        tell(self, "told", " ".join(texts))

    def status(self, status: RenderableType, **options: Any) -> Status:
        tell(self, "began", status)
        return Status(status, console=Console(quiet=True), **options)


def speak_json() -> None:
    """Let warnings, what libraries log, and faults of ours be such lines, too, in this process."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter())
    logging.getLogger().handlers[:] = [handler]
    logging.captureWarnings(True)
    sys.excepthook = _tell_fault
    threading.excepthook = lambda of: _tell_fault(of.exc_type, of.exc_value, of.exc_traceback)


def take_over(library: str) -> None:
    """Let a library that prints what it logs by itself log like all others."""
    if is_json():
        logger = logging.getLogger(library)
        logger.handlers.clear()
        logger.propagate = True


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level: Level = "info"
        if record.levelno >= logging.WARNING:
            level = "error" if record.levelno >= logging.ERROR else "warning"
        values: dict[str, object] = {"logger": record.name}
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        message = " ".join(record.getMessage().split())
        return _line("log", message, level, values).rstrip("\n")


def _tell_fault(
    kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
) -> None:
    lines = "".join(traceback.format_exception(kind, error, trace))
    message = f"{kind.__name__}: {' '.join(str(error or '').split())}"
    sys.stderr.write(_line("fault", message, "error", {"traceback": lines}))


def _line(event: str, message: str, level: Level, values: dict[str, object]) -> str:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    known = {
        "time": now, "level": level, "event": event.replace(" ", "_"), **_RUN, **values,
        "message": _COLOURS.sub("", message),
    }  # fmt: skip
    said = {name: value for name, value in known.items() if value not in (None, "", {}, [])}
    return _without_secrets(json.dumps(said, default=str)) + "\n"


def _without_secrets(line: str) -> str:
    """No text of ours names one, but a library's may quote what it was given."""
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET:
            line = line.replace(json.dumps(value)[1:-1], "…")
    return line
