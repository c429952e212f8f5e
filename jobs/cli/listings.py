"""What `quantfleet schemes`, `recipes` and `catalog check` print."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table
from rich.text import Text

from jobs.cli import options
from jobs.logging import print_result, url_name

if TYPE_CHECKING:
    from jobs.catalog.catalog_file import Catalog
    from jobs.catalog.entries import Gate, Settings
    from pipeline.recipe.recipe import Recipe

app = typer.Typer()


@app.command()
def schemes(as_json: options.Json = False) -> None:
    """List the quantization schemes: their fields, defaults and meaning."""
    from quantizer.schemes import SCHEMES

    described = {mode: describe_scheme(scheme) for mode, scheme in SCHEMES.items()}
    print_result(described, schemes_table(described), as_json=as_json)


@app.command()
def recipes(as_json: options.Json = False) -> None:
    """List the built-in recipes."""
    from pipeline.recipe.measured import measured_recipes
    from pipeline.recipe.recipe_file import builtin_recipes

    found = builtin_recipes()
    measured = measured_recipes()
    values = {
        name: recipe.to_dict()
        | {"measured": dataclasses.asdict(measured[name]) if name in measured else None}
        for name, recipe in found.items()
    }
    print_result(values, recipes_table(found), as_json=as_json)


def describe_scheme(scheme: type) -> dict[str, Any]:
    """A scheme's summary and fields, taken from its dataclass, as plain JSON values."""
    return {
        "summary": _first_line(scheme.__doc__),
        "fields": [_describe(field) for field in dataclasses.fields(scheme) if field.init],
    }


def _describe(field: dataclasses.Field[Any]) -> dict[str, Any]:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    required = default is dataclasses.MISSING
    return {
        "name": field.name,
        "default": None if required else default,
        "required": required,
        "doc": _first_line(field.metadata.get("doc")),
    }


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]


def schemes_table(described: dict[str, dict[str, Any]]) -> Table:
    """The schemes that `describe_scheme` described, one after another."""
    table = Table(
        *("scheme", "field", "default", "meaning"),
        caption="a recipe's mode: auto, with target_bits or target_bytes, and choices, gives each "
        "block the gptq of the width that serves the model best",
    )
    for mode, scheme in described.items():
        table.add_row(Text(mode, style="bold"), "", "", Text(scheme["summary"]))
        for field in scheme["fields"]:
            default = "required" if field["required"] else json.dumps(field["default"])
            # Text, since Rich would read a str's square brackets as markup.
            table.add_row("", field["name"], Text(default), Text(field["doc"]))
        table.add_section()
    return table


def recipes_table(recipes: Mapping[str, Recipe]) -> Table:
    """One line per recipe."""
    from pipeline.export.kernels import served_by
    from pipeline.recipe.measured import NOT_MEASURED, PLAINEST, how_measured, measured_recipes

    measured = measured_recipes()
    how = f"KL in nats a token, and time over that of {PLAINEST}: {how_measured() or NOT_MEASURED}"
    table = Table(
        *("recipe", "scheme", "embeddings", "served by, once exported", "calibration"),
        *("KL", "time"),
        caption=f"{how}\nall settings: --json",
    )
    for name, recipe in recipes.items():
        assert recipe.scheme is not None
        embeddings = "float" if recipe.embeddings is None else recipe.embeddings.policy
        texts = "none"
        if (given := recipe.calibration) is not None:
            names = ", ".join(given.text_urls)
            texts = f"{given.num_samples} × {given.sequence_length} tokens of {names}"
        served = served_by(recipe.scheme)
        table.add_row(
            Text(name, style="bold"),
            recipe.scheme.policy,
            embeddings,
            served,
            Text(texts),
            NOT_MEASURED if name not in measured else measured[name].divergence_text,
            NOT_MEASURED if name not in measured else measured[name].time_text,
        )
    return table


def catalog_json(catalog: Catalog) -> dict[str, Any]:
    """Every model with its recipes, defaults filled in, as plain JSON values."""
    return {
        "root": catalog.root_url,
        "num_runs": catalog.num_runs,
        "models": [
            {
                "name": entry.name,
                "preset": entry.preset,
                "aliases": list(entry.aliases),
                "recipes": [recipe.to_dict() for recipe in entry.recipes],
                "compositions": [
                    {"name": one.name, "recipes": [recipe.name for recipe in one.recipes]}
                    for one in entry.compositions
                ],
                **entry.settings.model_dump(
                    mode="json", exclude={"name", "preset", "alias_of", "recipes"}
                ),
            }
            for entry in catalog.entries
        ],
    }


def catalog_table(catalog: Catalog) -> Table:
    """One line per model, in execution order."""
    table = Table(
        *("model", "results", "evaluated on", "gate", "exports", "priority", "owner", "preset"),
        caption=f"{len(catalog.entries)} models, {catalog.num_runs} runs, in {catalog.root_url}",
    )
    for entry in catalog.entries:
        settings = entry.settings
        exports = ", ".join(dict.fromkeys(one.format for one in settings.export))
        table.add_row(
            Text("\n".join((entry.name, *(f"= {alias}" for alias in entry.aliases)))),
            Text(", ".join(entry.result_names)),
            Text("\n".join(_evaluated_on(settings)) or "–"),
            Text("\n".join(_limits(settings.gate)) or "–"),
            Text(exports or "–"),
            str(entry.settings.priority),
            Text(entry.settings.owner or "–"),
            Text(entry.preset),
        )
    return table


def _evaluated_on(settings: Settings) -> Iterator[str]:
    """What results are evaluated on, in a few words: sets of texts, and tasks."""
    for name, urls in settings.evaluated_on.by_name.items():
        files = "1 source" if len(urls) == 1 else f"{len(urls)} sources"
        yield f"{name or 'texts'}: {files}"
    if settings.tasks:
        yield f"tasks: {', '.join(url_name(url) for url in settings.tasks)}"


def _limits(gate: Gate | None) -> Iterator[str]:
    """The limits of a gate, and those of each set of texts, a line each."""
    if gate is None:
        return
    limits = gate.model_dump(exclude_none=True)
    sets = {name: limits.pop(name) for name in gate.sets}
    for where, of_set in {"": limits, **sets}.items():
        values = ", ".join(f"{name} {value:g}" for name, value in of_set.items())
        if values:
            yield f"{where}: {values}" if where else values
