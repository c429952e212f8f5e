"""The recipes that come with the package, by name."""

from __future__ import annotations

from functools import cache

from pipeline.recipe.recipe import Calibration, Recipe
from quantizer.schemes import AWQScheme, Float8Scheme, GPTQScheme, Int4Scheme, Int8Scheme, Scheme

CALIBRATION = Calibration(texts=("hf:allenai/c4/en?split=train",))
"""General English web text, shuffled already; streamed, so only its beginning is fetched."""


@cache
def _all() -> tuple[Recipe, ...]:
    return (
        _recipe("int8", Int8Scheme()),
        _recipe("int4", Int4Scheme()),
        _recipe("int4-g64", Int4Scheme(block_size=64)),
        _recipe("float8", Float8Scheme()),
        *(
            _recipe(f"gptq-w{bits}-g{size}", _gptq(bits, size))
            for bits, size in ((4, 128), (4, 64), (4, 32), (3, 128), (3, 64), (2, 64), (2, 32))
        ),
        _recipe("gptq-w8", _gptq(8, 128)),
        *(_recipe(f"awq-w4-g{size}", AWQScheme(group_size=size)) for size in (128, 64, 32)),
    )


def builtin_recipes() -> dict[str, Recipe]:
    """Every built-in recipe by its name, in alphabetical order; embeddings stay in float."""
    return {recipe.name: recipe for recipe in sorted(_all(), key=lambda recipe: recipe.name)}


def _gptq(weight_bits: int, group_size: int) -> Scheme:
    # The settings of the lowest output error; each costs time only while quantizing.
    return GPTQScheme(
        weight_bits=weight_bits,
        group_size=group_size,
        activation_order=True,
        scale_search=True,
        refinement_sweeps=2,
    )


def _recipe(name: str, scheme: Scheme) -> Recipe:
    weights_only = isinstance(scheme, Int8Scheme | Int4Scheme)
    return Recipe(name=name, scheme=scheme, calibration=None if weights_only else CALIBRATION)
