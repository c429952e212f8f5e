"""The command line on a real pseudo-terminal: it shows at once that it lives, and then how far."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

import jobs.logging
from jobs.logging import FORMAT_VARIABLE, LOG, TextHandler, configure
from jobs.progress.run import watch
from pipeline.executor.protocol import Allocation
from pipeline.executor.work_spans import Doing
from pipeline.run.events import Step
from pipeline.storage.object_store import open_store
from tests.integration.ray_cluster import quiet_environment
from tests.pipeline.tiny_runs import CountingExecutor, execute, planned, recipe, source

_SIGN_OF_LIFE_SECONDS = 2.0
_CLEARED, _CURSOR_BACK = "\x1b[2K", "\x1b[?25h"


def set_width(terminal: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))


def plain(text: str) -> str:
    """What is to be read, without colours and movements of the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """Make a pseudo-terminal stderr; returns what reads all that it was sent."""
    ours, theirs = pty.openpty()
    set_width(theirs, 100)
    received: list[bytes] = []

    def read() -> None:
        with os.fdopen(ours, "rb", buffering=0) as stream:
            try:
                while data := stream.read(65536):
                    received.append(data)
            except OSError:  # the other end is closed
                pass

    reading = threading.Thread(target=read)
    reading.start()
    stream = os.fdopen(theirs, "w")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    console = Console(file=stream, markup=False, highlight=False)
    assert console.is_terminal
    configure("text")
    monkeypatch.setattr(jobs.logging, "STDERR", console)
    monkeypatch.setattr(LOG, "handlers", [TextHandler(console)])

    def sent() -> str:
        if not stream.closed:
            stream.close()
        reading.join()
        return b"".join(received).decode()

    yield sent
    sent()


class KeptExecutor(CountingExecutor):
    """The latest one can be asked what its workers do."""

    latest: KeptExecutor | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        KeptExecutor.latest = self


def test_a_real_run_is_drawn_on_a_terminal_and_leaves_it_as_it_was(
    terminal: Callable[[], str], tmp_path: Path
) -> None:
    given = planned("int8")
    asked = threading.Semaphore(0)

    def doing() -> Mapping[int, Doing]:
        if KeptExecutor.latest is None:  # it is not made yet
            return {}
        asked.release()
        return KeptExecutor.latest.doing()

    with watch(given.plan, Allocation(workers=2, threads=2), doing) as report:
        report(Step(event="lost", text="a worker was lost"))
        store = open_store(str(tmp_path))
        execute(given, store, workers=2, report=report, make_executor=KeptExecutor)
        for _ in range(2):  # so that the first answer has been taken in
            assert asked.acquire(timeout=30)
    text = terminal()
    assert "Llama3Backbone × int8 ━" in plain(text)
    assert "4/4 parts" in plain(text)
    assert "worker 1  waiting" in plain(text)
    assert "lost: a worker was lost" in plain(text)
    assert "committed" not in plain(text)  # as lines are, where there is no terminal
    assert _CLEARED in text
    assert text.rindex(_CURSOR_BACK) > text.rindex("parts")


def test_machines_see_no_view_even_on_a_terminal(
    terminal: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FORMAT_VARIABLE, "json")
    with (
        jobs.logging.waiting("starting Ray"),
        watch(planned("int8").plan, Allocation(workers=1, threads=2)),
    ):
        pass
    assert terminal() == ""


def test_a_dumb_terminal_gets_lines(
    terminal: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with watch(planned("int8").plan, Allocation(workers=1, threads=2)) as report:
        report(Step(event="lost", text="a worker was lost"))
    assert terminal().splitlines() == ["lost: a worker was lost"]


class Command:
    """`quantfleet` on a terminal of its own.

    Attributes:
        text: that it has shown so far.
        seconds: of the processor until it showed anything: what others do here does not count.
    """

    def __init__(self, *arguments: str | Path) -> None:
        environment = quiet_environment() | {"TERM": "xterm-256color", "KERAS_BACKEND": "jax"}
        self._terminal, theirs = pty.openpty()
        set_width(theirs, 100)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "jobs.cli.start", *map(str, arguments)],
            env=environment,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self.text = ""
        while not plain(self.text).strip() and self.read():
            pass
        ticks = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        self.seconds = (int(ticks[11]) + int(ticks[12])) / os.sysconf("SC_CLK_TCK")

    def read(self) -> bool:
        try:
            data = os.read(self._terminal, 65536)
        except OSError:  # it has ended
            data = b""
        self.text += data.decode(errors="replace")
        return bool(data)

    def end(self) -> int:
        while self.read():
            pass
        os.close(self._terminal)
        return self._process.wait()

    def terminate(self) -> int:
        self._process.send_signal(signal.SIGTERM)
        return self.end()


@pytest.fixture
def arguments(tmp_path: Path) -> list[str | Path]:
    """Of a run without calibration."""
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe("int8").to_dict()))
    return ["quantize", source(), "--recipe", file, "--output", tmp_path / "out"]


def test_quantize_shows_at_once_that_it_lives(arguments: list[str | Path]) -> None:
    command = Command(*arguments)
    assert command.terminate() == 143
    assert command.seconds < _SIGN_OF_LIFE_SECONDS
    assert "looking at preset and output" in plain(command.text)


def test_nightly_shows_at_once_that_it_lives(tmp_path: Path) -> None:
    catalog = tmp_path / "catalog.yaml"
    catalog.write_text("root: fleet\ndefaults: {recipes: [int8]}\nmodels: [{name: a, preset: a}]\n")
    command = Command("nightly", catalog)
    assert command.end() == 2
    assert command.seconds < _SIGN_OF_LIFE_SECONDS
    text = plain(command.text)
    assert text.index("reading the catalog") < text.index("looking for stale runs")
    assert "0/1 entries" not in text


@pytest.mark.ray
@pytest.mark.exhaustive
def test_a_run_on_ray_says_what_takes_long_and_what_its_workers_do(
    arguments: list[str | Path],
) -> None:
    command = Command(*arguments)
    assert command.end() == 0
    text = plain(command.text)
    assert command.seconds < _SIGN_OF_LIFE_SECONDS
    for told in (
        "planning: hashing the source",
        "starting Ray, and workers, on this machine",
        "worker 0  starting, importing Keras",
        "4/4 parts",
    ):
        assert told in text
    assert re.search(r"worker 0  (waiting|quantize alone|finalize)", text)  # it has answered
    assert "weights" in text  # the summary
    assert command.text.rindex(_CURSOR_BACK) > command.text.rindex("parts")
