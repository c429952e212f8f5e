"""A composition that a catalog asks for: of which recipes' runs, and how large."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.catalog.entries import Compose
from pipeline.composition.target import Target
from pipeline.errors import PipelineError
from pipeline.recipe.auto_recipe import AutoRecipe
from pipeline.recipe.recipe import Recipe


class CompositionError(PipelineError):
    """A composition that cannot be made."""


@dataclass(frozen=True, kw_only=True)
class Composition:
    """A result of a given size, to be made of the blocks of a model's runs.

    Attributes:
        name: what it is published as, where runs have their recipes' names.
        recipes: whose runs give blocks, in the catalog's order.
        measure_texts, measure_windows: see `jobs.composition_texts.AskedTexts`.
        by_layers: whether layers of one block may come from several runs.
        makes_runs: whether the runs are made for it alone, and not published themselves.
    """

    name: str
    target: Target
    recipes: tuple[Recipe, ...]
    measure_texts: tuple[str, ...]
    measure_windows: int
    by_layers: bool
    makes_runs: bool = False


def composition_of_choices(recipe: AutoRecipe) -> Composition:
    """What a recipe that chooses widths asks for: a run of each, and the best of their blocks."""
    scheme = recipe.scheme
    return Composition(
        name=recipe.name,
        target=Target(bits=scheme.target_bits, num_bytes=scheme.target_bytes),
        recipes=recipe.recipes,
        measure_texts=(),
        measure_windows=scheme.measure_windows,
        by_layers=scheme.by_layers,
        makes_runs=True,
    )


def composition_of(
    asked: Compose, recipes: Mapping[str, Recipe], measure_texts: Sequence[str]
) -> Composition:
    """What a catalog asks for, with its recipes.

    Args:
        recipes: of the model, by name.
        measure_texts: absolute.

    Raises:
        CompositionError: there is nothing to choose from, or runs that could not be composed.
    """
    names = tuple(recipes) if asked.recipes is None else asked.recipes
    for name in names:
        if name not in recipes:
            near = difflib.get_close_matches(name, recipes, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise CompositionError(
                f"compose takes the blocks of recipes of this model, and {name} is none; {hint}its "
                f"recipes are {', '.join(recipes)}"
            )
    chosen = tuple(recipe for name, recipe in recipes.items() if name in names)
    if len(chosen) < 2:
        raise CompositionError(
            f"a composition takes blocks of at least two recipes, and there is {len(chosen)}; add "
            "another one to recipes, or remove compose"
        )
    first = chosen[0]
    references = [first, *[one for one in chosen if one.needs_calibration][:1]]
    for recipe in chosen:
        for reference in references:
            if found := "; ".join(_differences(reference, recipe)):
                raise CompositionError(
                    f"recipes {reference.name} and {recipe.name} cannot be composed: {found}; give "
                    "both the same, or name other recipes in compose"
                )
    if not measure_texts and not any(recipe.needs_calibration for recipe in chosen):
        raise CompositionError(
            "none of the recipes calibrates, so that there are no windows to measure their blocks "
            "on; add measure_on: [texts.jsonl] to compose"
        )
    target = asked.target
    return Composition(
        name=asked.name or target.recipe_name,
        target=target,
        recipes=chosen,
        measure_texts=tuple(measure_texts),
        measure_windows=asked.measure_windows,
        by_layers=asked.by_layers,
    )


def _differences(first: Recipe, second: Recipe) -> Iterator[str]:
    """What differs between two recipes whose runs' blocks are to fit together.

    What only the models tell, such as a rule for a layer outside the blocks, is found when they are
    planned (see `pipeline.composition.composed_plan.check_composable`).
    """
    for name in ("dtype", "embeddings"):
        values = [getattr(recipe, name) for recipe in (first, second)]
        if values[0] != values[1]:
            yield f"{name} {_shown(values[1])}, there {_shown(values[0])}"
    if first.needs_calibration and second.needs_calibration:
        ours, theirs = _windows(second), _windows(first)
        names = [name for name in ours if ours[name] != theirs[name]]
        if names:
            yield f"they calibrate on other windows ({', '.join(names)})"


def _windows(recipe: Recipe) -> dict[str, Any]:
    """What decides the windows that a recipe calibrates on."""
    assert recipe.calibration is not None
    return {
        name: getattr(recipe.calibration, name)
        for name in type(recipe.calibration).model_fields
        if name != "statistics"
    }


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return str(getattr(value, "policy", value))
