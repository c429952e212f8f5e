"""Where commands print: JSON for machines on stdout, what is told meanwhile on stderr."""

from __future__ import annotations

import json
import sys

from rich.console import Console

from jobs.logging import JsonConsole, is_json


def print_json(value: object) -> None:
    """Plain JSON values, keys sorted."""
    sys.stdout.write(json.dumps(value, indent=2, sort_keys=True) + "\n")


def stderr() -> Console:
    """Paths and names are text, not markup, however they are spelled."""
    if is_json():
        return JsonConsole()
    return Console(stderr=True, markup=False, highlight=False)
