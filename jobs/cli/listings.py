"""`quantfleet schemes`: every scheme with its fields, as its dataclass says them.

`quantfleet recipes`: the built-in recipes, as a table or as JSON.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from rich.table import Table
from rich.text import Text

from pipeline.recipe.recipe_file import builtin_recipes


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


def schemes_table(described: dict[str, dict[str, Any]]) -> Table:
    """What `describe_scheme` found, a scheme after the other."""
    table = Table("scheme", "field", "default", "meaning")
    for mode, scheme in described.items():
        table.add_row(Text(mode, style="bold"), "", "", Text(scheme["summary"]))
        for field in scheme["fields"]:
            default = "required" if field["required"] else json.dumps(field["default"])
            # Text, since Rich would read a str's square brackets as markup.
            table.add_row("", field["name"], Text(default), Text(field["doc"]))
        table.add_section()
    return table


def recipes_json() -> dict[str, Any]:
    """Every built-in recipe, with all defaults written out."""
    return {name: recipe.to_dict() for name, recipe in builtin_recipes().items()}


def recipes_table() -> Table:
    """What each recipe does, in a line."""
    table = Table("recipe", "scheme", "calibration", caption="all settings: --json")
    for name, recipe in builtin_recipes().items():
        assert recipe.scheme is not None
        calibration = recipe.calibration
        texts = (
            "none"
            if calibration is None
            else f"{calibration.num_samples} × {calibration.sequence_length} tokens of "
            f"{', '.join(calibration.texts)}"
        )
        table.add_row(Text(name, style="bold"), recipe.scheme.policy, Text(texts))
    return table
