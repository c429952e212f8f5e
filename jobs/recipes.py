"""`quantfleet recipes`: the built-in recipes, as a table or as JSON."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from jobs.summary import scheme_name
from pipeline.recipe.builtin_recipes import builtin_recipes
from quantizer.schemes import scheme_to_dict


def recipes_json() -> dict[str, Any]:
    """Every built-in recipe, with all defaults written out."""
    return {name: recipe.to_dict() for name, recipe in builtin_recipes().items()}


def recipes_table() -> Table:
    """What each recipe does, in a line."""
    table = Table("recipe", "scheme", "calibration", caption="all settings: --json")
    for name, recipe in builtin_recipes().items():
        assert recipe.scheme is not None
        values = scheme_to_dict(recipe.scheme)
        calibration = recipe.calibration
        texts = (
            "none"
            if calibration is None
            else f"{calibration.num_samples} × {calibration.sequence_length} tokens of "
            f"{', '.join(calibration.texts)}"
        )
        table.add_row(Text(name, style="bold"), scheme_name(values), Text(texts))
    return table
