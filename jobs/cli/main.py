"""The `quantfleet` command.

It must start instantly, so nothing here imports Ray, JAX or Keras before a command needs them.
"""

from __future__ import annotations

import errno
import importlib.metadata
import io
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from typing import Annotated, Never

import typer

from jobs.cli import compositions, fleet, listings, results, runs
from jobs.logging import (
    FORMAT_VARIABLE,
    LogFormat,
    configure,
    is_json,
    log_event,
    set_run,
)
from jobs.termination import Terminated, terminable
from pipeline.errors import PipelineError
from quantizer.errors import QuantizationError

app = typer.Typer(
    help="Quantize Keras language models in batches.",
    epilog=(
        "Exit codes: 0 done, 1 internal error, 2 bad input, 3 storage or cluster unavailable or "
        "run held by another driver, 4 damaged or incomplete result, 5 gate not passed, "
        "6 a composition that measured worse than a run, which was kept, "
        "130 interrupted, 143 terminated."
    ),
    add_completion=False,
    pretty_exceptions_enable=False,
)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"quantfleet {importlib.metadata.version('quantfleet')}")
        raise typer.Exit


@app.callback()
def quantfleet(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    log_format: Annotated[
        LogFormat,
        typer.Option(
            envvar=FORMAT_VARIABLE,
            help="What is written to stderr: text, or one JSON object per line.",
        ),
    ] = "text",
) -> None:
    """Options that belong to no command."""
    os.environ[FORMAT_VARIABLE] = log_format  # also for the processes that a command starts
    # Otherwise Ray's nodes print to stdout, among the results, what is reported here anyway.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    set_run()
    configure(log_format)


app.add_typer(runs.app)
app.add_typer(compositions.app)
app.add_typer(results.app)
app.add_typer(fleet.app)
app.add_typer(listings.app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake costs one line and an exit code, no traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    configure("json" if is_json() else "text")  # for mistakes in the command line itself
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that lacks a character gets a question mark.
        sys.stdout.reconfigure(errors="replace")
    try:
        with terminable():
            exit_code = app(arguments or ["--help"], prog_name="quantfleet", standalone_mode=False)
    except typer.TyperException as mistake:
        _end(_usage_message(mistake), 2)
    except PipelineError as error:
        _end(str(error), error.exit_code)
    except QuantizationError as error:
        _end(str(error), 2)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        place = error.filename or f"{tempfile.gettempdir()}, or the folder of the output"
        _end(f"{place}: {error.strerror}; free some space, or set TMPDIR to another folder", 3)
    except Terminated:
        _end("", 143)
    except (typer.Abort, KeyboardInterrupt):  # Ctrl-C
        _end("", 130)
    sys.exit(exit_code or 0)


def _usage_message(mistake: typer.TyperException) -> str:
    # Typer's own choices are checked by pydantic, whose messages begin like this.
    message = mistake.format_message().replace("Value error, ", "")
    message += "" if message.endswith((".", "?")) else "."
    context = getattr(mistake, "ctx", None)
    return message if context is None else f"{message} See {context.command_path} --help."


def _end(message: str, exit_code: int) -> Never:
    event = "failed" if message else "interrupted"
    message = " ".join(message.split())
    if message and not is_json():
        message = f"quantfleet: {message}"
    log_event(event, message, {"exit_code": exit_code}, level=logging.ERROR)
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
