"""Whether a recipe fits a model's layers, asked before anything starts."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.errors import RecipeError
from pipeline.recipe.recipe import Kind, Recipe
from quantizer.schemes import AWQScheme, GPTQScheme

_SHOWN = 5


def check_recipe(recipe: Recipe, layers: Sequence[tuple[str, Kind, int]]) -> None:
    """Refuse groups that are larger than a layer, and a recipe that would change nothing.

    A last group may be short: group_size need not divide the input features. int4's block_size
    may be larger, as in Keras, and then means one block.

    Args:
        recipe: the recipe.
        layers: (path, kind, in_features) of every layer that could be quantized.

    Raises:
        RecipeError: with the layers and the remedy.
    """
    chosen = [(path, size, recipe.scheme_for(path, kind)) for path, kind, size in layers]
    too_small = {
        path: (scheme.group_size, size)
        for path, size, scheme in chosen
        if isinstance(scheme, GPTQScheme | AWQScheme) and scheme.group_size > size
    }
    if too_small:
        shown = [
            f"{path} (group_size {group_size}, in_features {size})"
            for path, (group_size, size) in list(too_small.items())[:_SHOWN]
        ]
        more = f" and {len(too_small) - _SHOWN} more" if len(too_small) > _SHOWN else ""
        limit = min(size for _, size in too_small.values())
        raise RecipeError(
            f"recipe {recipe.name}: groups larger than the layer: {', '.join(shown)}{more}; use "
            f"a group_size of at most {limit}, or -1 for one group, or leave these layers in "
            "float by a rule {pattern: ..., scheme: null}"
        )
    if all(scheme is None for _, _, scheme in chosen):
        raise RecipeError(
            f"recipe {recipe.name}: none of the model's {len(layers)} layers would be quantized; "
            "loosen the patterns of its rules, or give scheme a default"
        )


def unmatched_patterns(recipe: Recipe, layers: Sequence[tuple[str, Kind, int]]) -> tuple[str, ...]:
    """Those rules' patterns that decide no layer: mistyped, shadowed, or for other models."""
    deciding = {recipe.rule_for(path) for path, kind, _ in layers if kind == "kernel"}
    return tuple(rule.pattern for rule in recipe.rules if rule not in deciding)
