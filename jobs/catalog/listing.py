"""`quantfleet catalog check`: what a catalog wants, as a table or as JSON."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from jobs.catalog.catalog_file import Catalog


def catalog_json(catalog: Catalog) -> dict[str, Any]:
    """Every model with its recipes, everything that it inherits written out."""
    return {
        "root": catalog.root_url,
        "num_runs": catalog.num_runs,
        "models": [
            {
                "name": entry.name,
                "preset": entry.preset,
                "aliases": list(entry.aliases),
                "recipes": [recipe.to_dict() for recipe in entry.recipes],
                **entry.settings.model_dump(
                    mode="json", exclude={"name", "preset", "alias_of", "recipes"}
                ),
            }
            for entry in catalog.entries
        ],
    }


def catalog_table(catalog: Catalog) -> Table:
    """A line for each model, in the order in which they are made."""
    table = Table(
        *("model", "recipes", "gate", "priority", "owner", "preset"),
        caption=f"{len(catalog.entries)} models, {catalog.num_runs} runs, below {catalog.root_url}",
    )
    for entry in catalog.entries:
        gate = entry.settings.gate
        limits = {} if gate is None else gate.model_dump(exclude_none=True)
        table.add_row(
            Text("\n".join((entry.name, *(f"= {alias}" for alias in entry.aliases)))),
            Text(", ".join(recipe.name for recipe in entry.recipes)),
            Text(", ".join(f"{name} {value:g}" for name, value in limits.items()) or "–"),
            str(entry.settings.priority),
            Text(entry.settings.owner or "–"),
            Text(entry.preset),
        )
    return table
