"""The `quantfleet` command.

Starting it must stay instant, so nothing here may import JAX or Keras before a command needs them.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from quantizer.schemes import SCHEMES

app = typer.Typer(
    help="Quantize Keras language models in batches.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"quantfleet {importlib.metadata.version('quantfleet')}")
        raise typer.Exit


@app.callback()
def quantfleet(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Options that belong to no command."""


@app.command()
def schemes(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the quantization schemes: their fields, defaults and meaning."""
    described = {mode: describe_scheme(scheme) for mode, scheme in SCHEMES.items()}
    if as_json:
        typer.echo(json.dumps(described, indent=2))
    else:
        Console().print(_schemes_table(described))


def describe_scheme(scheme: type) -> dict[str, Any]:
    """Return what a scheme's dataclass says about itself, as plain JSON values."""
    return {
        "summary": _first_line(scheme.__doc__),
        "fields": [
            {
                "name": field.name,
                "default": None if _is_required(field) else _default(field),
                "required": _is_required(field),
                "doc": _first_line(field.metadata.get("doc")),
            }
            for field in dataclasses.fields(scheme)
            if field.init
        ],
    }


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]


def _schemes_table(described: dict[str, dict[str, Any]]) -> Table:
    table = Table("scheme", "field", "default", "meaning")
    for mode, scheme in described.items():
        table.add_row(Text(mode, style="bold"), "", "", Text(scheme["summary"]))
        for field in scheme["fields"]:
            default = "required" if field["required"] else json.dumps(field["default"])
            # Text, since Rich would read a str's square brackets as markup.
            table.add_row("", field["name"], Text(default), Text(field["doc"]))
        table.add_section()
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: a user's mistake costs one line and exit code 2, no traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = app(arguments or ["--help"], prog_name="quantfleet", standalone_mode=False)
    except typer.TyperException as mistake:
        typer.echo(f"quantfleet: {' '.join(mistake.format_message().split())}", err=True)
        sys.exit(2)
    except typer.Abort:  # Ctrl-C
        sys.exit(130)
    sys.exit(status or 0)
