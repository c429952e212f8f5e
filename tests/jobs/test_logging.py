"""What stderr gets: text for people, or one JSON object per line, also for errors of any kind."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, Group
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from jobs.logging import (
    LOG,
    JsonFormatter,
    TextConsole,
    TextHandler,
    configure,
    log_event,
    print_table,
    set_run,
    url_name,
)
from tests.models.tiny import tiny_preset

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _of_no_run() -> None:
    set_run()


def lines(text: str) -> list[dict[str, Any]]:
    """Each is an object, and nothing else is between them."""
    assert "\x1b" not in text
    return [json.loads(line) for line in text.splitlines()]


@contextlib.contextmanager
def json_lines() -> Iterator[list[dict[str, Any]]]:
    """What is logged meanwhile, as machines read it."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    configure("text")
    LOG.handlers[:] = [handler]
    found: list[dict[str, Any]] = []
    yield found
    LOG.handlers[:] = []
    found += lines(stream.getvalue())


def command(*arguments: object, code: str = "", **environment: str) -> tuple[int, str, str]:
    started = ["-c", code] if code else ["-m", "jobs.cli.main", *map(str, arguments)]
    done = subprocess.run(
        [sys.executable, *started],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_json_line_has_the_fields_that_platforms_filter_by() -> None:
    set_run(run="llama-gptq-0123", model="llama", recipe="gptq")
    about = {"block": "layer_3", "layer": "layer_3/query", "seconds": {"solve": 1.5}}
    with json_lines() as found:
        log_event("is seen", "a part", {**about, "nothing": None, "empty": []})
    [line] = found
    assert list(line)[:3] == ["time", "level", "event"]
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "info",
        "event": "is_seen",
        "run": "llama-gptq-0123",
        "model": "llama",
        "recipe": "gptq",
        **about,
        "message": "a part",
    }


def test_a_line_names_the_current_run_from_any_thread() -> None:
    set_run(run="a", model="m")
    with json_lines() as found:
        set_run(run="b")
        log_event("is seen", "x")
        thread = threading.Thread(target=log_event, args=("is seen", "y"))
        thread.start()
        thread.join()
        set_run()
        log_event("is seen", "z")
    assert [line.get("run") for line in found] == ["b", "b", None]
    assert all("model" not in line for line in found)


def test_a_message_is_one_line_without_colours() -> None:
    messages = ["two\nlines", "\x1b[31mred\x1b[0m", "[bold]b[/bold]", "ü" * 400, "100% s"]
    with json_lines() as found:
        for message in messages:
            log_event("is seen", message)
        log_event("shown", "", {"rows": 1}, table=Table("name"))
    assert [line.get("message") for line in found] == [
        "two\nlines", "red", "[bold]b[/bold]", "ü" * 400, "100% s", None,
    ]  # fmt: skip
    assert found[-1]["rows"] == 1


def test_people_get_messages_and_tables() -> None:
    stream = io.StringIO()
    configure("text")
    LOG.handlers[:] = [TextHandler(Console(file=stream, width=20))]
    log_event("seen", "[bold]b[/bold] " + "x" * 40, {"run": "r"}, level=logging.ERROR)
    log_event("interrupted", "", {"exit_code": 130})
    assert stream.getvalue() == "[bold]b[/bold] " + "x" * 40 + "\n"
    log_event("shown", "", table=Table("name"))
    assert "name" in stream.getvalue()


def test_no_secret_of_the_environment_is_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", 'canary/"secret"')
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/etc/token-file")
    with json_lines() as found:
        values = {"why": ["0123456789abcdef"], "file": "/etc/token-file"}
        log_event("is seen", 'is canary/"secret"', values)
    [line] = found
    assert line["message"] == "is …"
    assert line["why"] == ["…"]
    assert line["file"] == "/etc/token-file"


@pytest.mark.parametrize("url", ["s3://b/runs/r-1", "s3://b/runs/r-1/", "/a/r-1"])
def test_a_run_is_named_by_the_last_part_of_its_url(url: str) -> None:
    assert url_name(url) == "r-1"


@pytest.mark.parametrize(
    ("given", "environment"),
    [(["--log-format", "json"], {}), ([], {"QUANTFLEET_LOG": "json"})],
)
def test_a_users_mistake_is_a_json_line_with_its_exit_code(
    given: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    code, out, err = command(*given, "logs", tmp_path, FORCE_COLOR="1", **environment)
    [line] = lines(err)
    assert (code, out) == (2, "")
    assert (line["level"], line["event"], line["exit_code"]) == ("error", "failed", 2)
    assert "no events are there" in line["message"]


def test_a_usage_mistake_is_a_json_line_too() -> None:
    for arguments in (["quantise"], ["--no-such"], ["logs"]):
        code, _, err = command(*arguments, QUANTFLEET_LOG="json")
        [line] = lines(err)
        assert (code, line["exit_code"]) == (2, 2)


def test_an_unknown_log_format_is_rejected_in_one_line() -> None:
    code, _, err = command("schemes", QUANTFLEET_LOG="xml")
    assert code == 2
    [line] = err.splitlines()
    assert "QUANTFLEET_LOG" in line
    assert "xml" in line


def test_warnings_library_logs_and_uncaught_exceptions_are_json_lines() -> None:
    code, _, err = command(
        code="""
import logging, threading, warnings
from jobs.logging import configure, set_run
configure("json")
set_run(run="r")
warnings.warn("old\\nways")
logging.getLogger("library").error("lost %s", "it")
logging.getLogger("library").info("chatter")
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("library").exception("why")
thread = threading.Thread(target=lambda: [][0])
thread.start()
thread.join()
raise OSError("disk")
"""
    )
    found = lines(err)
    assert code == 1
    assert [(line["level"], line["event"], line["run"]) for line in found] == [
        ("warning", "log", "r"), ("error", "log", "r"), ("error", "log", "r"),
        ("error", "fault", "r"), ("error", "fault", "r"),
    ]  # fmt: skip
    assert "UserWarning: old ways" in found[0]["message"]
    assert found[1]["message"] == "lost it"
    assert "ZeroDivisionError" in found[2]["traceback"]
    assert found[3]["message"].startswith("IndexError: ")
    assert found[4]["message"] == "OSError: disk"
    assert "Traceback" in found[4]["traceback"]


@pytest.mark.slow
def test_a_run_logs_every_part_and_layer_as_json(tmp_path: Path) -> None:
    preset = tiny_preset("Bert", tmp_path / "bert", num_blocks=2)
    given = ("quantize", preset, "--recipe", "int8", "--output", tmp_path / "run-1")
    code, out, err = command(*given, "--threads", 1, "--workers", 1, QUANTFLEET_LOG="json")
    found = lines(err)
    assert (code, out) == (0, "")
    assert {(line["run"], line["model"], line["recipe"]) for line in found} == {
        ("run-1", "bert", "int8")
    }
    committed = [line for line in found if line["event"] == "committed"]
    assert [line["part"] for line in committed] == [0, 1, 2]
    assert all(line["block"] and line["size_bytes"] and "seconds" in line for line in committed[:1])
    layers = [line for line in found if line["event"] == "layer"]
    assert {line["block"] for line in layers} == {line["block"] for line in committed}
    assert all(line["layer"] for line in layers)
    [finished] = [line for line in found if line["event"] == "finished"]
    assert finished["summary"]["stored_bytes"] == sum(line["size_bytes"] for line in committed)
    code, _, err = command("resume", tmp_path / "run-1", QUANTFLEET_LOG="json")
    assert code == 0
    pages = ["began", "began"]  # card and report
    ends = ["finished_before", *pages, "finished", "loadable", "loadable", "reported"]
    assert [line["event"] for line in lines(err)] == ends


DIGEST = "7594868e61d16c80bd8e97e25c90e8a068923e57fbe059dbb99741c4778903c2"
ROWS = [
    ["self_attention/attention_output", "gptq/4/128", "12,345,678", "0.12345", DIGEST],
    ["one", "two words", "3", "left in float, since there is no more to say about it", "é日本"],
]


def printed(*, width: int, is_terminal: bool) -> str:
    names = ("layer", "scheme", "bytes", "why", "digest")
    table = Table(*(Column(name, justify="right") for name in names), title=f"plan {DIGEST[:12]}")
    for row in ROWS:
        table.add_row(*row)
    facts = Table(show_header=False, box=None)
    facts.add_row("stored", "blocks 36.4 MiB (16.2 bits a weight), embeddings 9.6 MiB")
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=is_terminal, color_system=None)
    print_table(console, Group(table, facts, Text(f"a {DIGEST}", no_wrap=True, overflow="ignore")))
    return stream.getvalue()


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_a_narrow_terminal_cuts_and_breaks_no_word(width: int) -> None:
    shown = printed(width=width, is_terminal=True)
    for word in (word for row in ROWS for cell in row for word in cell.split()):
        assert word in shown
    assert f"a {DIGEST}\n" in shown
    assert "…" not in shown
    # What can be narrower is.
    assert all(len(line) <= max(width, 145) for line in shown.splitlines())


def test_a_pipe_gets_every_row_on_one_line() -> None:
    shown = printed(width=80, is_terminal=False)
    for row in ROWS:
        [line] = [line for line in shown.splitlines() if row[0] in line]
        assert all(cell in line for cell in row)


def test_no_text_of_others_steers_the_terminal() -> None:
    stream = io.StringIO()
    console = TextConsole(file=stream, width=100, force_terminal=True, color_system=None)
    table = Table("name \x1b[2J")
    table.add_row("[b]\x1b]0;title\x07\x9b31m")
    TextHandler(console).emit(logging.makeLogRecord({"msg": "damaged: \x1b[1A\x1b[2Kall is well"}))
    print_table(console, table)
    with Live(Text("model\x1b[5n"), console=console):
        pass
    sent = stream.getvalue()
    for command in ("\x1b[2J", "\x1b]0;", "\x9b", "\x1b[1A\x1b[2Kall", "\x1b[5n"):
        assert command not in sent
    for seen in ("name ␛[2J", "[b]␛]0;title", "damaged: ␛[1A␛[2Kall is well", "model␛[5n"):
        assert seen in sent
    assert "\x1b[?25h" in sent  # what Rich itself sends


def test_a_path_on_a_narrow_terminal_is_not_broken() -> None:
    stream = io.StringIO()
    console = TextConsole(file=stream, width=40, force_terminal=True, color_system=None)
    path = f"/a folder/{'of results/' * 9}report.html"
    print_table(console, Text(f"report: {path}"))
    assert stream.getvalue() == f"report: {path}\n"
