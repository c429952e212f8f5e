"""Recipes by built-in name, from a YAML file, or from plain values."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from pipeline.errors import RecipeError
from pipeline.recipe.auto_recipe import ACCURATE, AnyRecipe, AutoRecipe, is_auto
from pipeline.recipe.recipe import Calibration, Recipe, Tuning
from pipeline.recipe.yaml_document import (
    MAX_BYTES,
    MarkedYaml,
    YamlPath,
    describe_mistake,
    mistake_order,
    mistakes_in,
    read_yaml,
)
from pipeline.storage.user_files import read_given_text
from quantizer.schemes import AWQScheme, Float8Scheme, GPTQScheme, Int4Scheme, Int8Scheme, Scheme


def load_recipe(name_or_file: str) -> AnyRecipe:
    """A built-in recipe by its name, or one read from a YAML file.

    Args:
        name_or_file: a file's path or URL contains a "/" or ends in .yaml or .yml. Write `./name`
            for a file named like a built-in recipe.

    Raises:
        RecipeError: an unknown name, an unreadable file, or an invalid recipe.
    """
    known = builtin_recipes()
    if name_or_file in known:
        return known[name_or_file]
    if "/" not in name_or_file and not name_or_file.endswith((".yaml", ".yml")):
        near = difflib.get_close_matches(name_or_file, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise RecipeError(
            f"unknown recipe {name_or_file!r}; {hint}choose one of {', '.join(known)}, or give "
            "the path of a .yaml file"
        )
    text = read_given_text(name_or_file, max_bytes=MAX_BYTES, error_type=RecipeError)
    return parse_recipe(text, where=name_or_file)


def parse_recipe(text: str, *, where: str) -> AnyRecipe:
    """Read a recipe from YAML text.

    Raises:
        RecipeError: `where:line: what is wrong; what to do`.
    """
    document = read_yaml(text, where=where, error_type=RecipeError)
    model = _model(document.values)
    try:
        return model.model_validate(document.values)
    except ValidationError as invalid:
        errors = sorted(
            mistakes_in(invalid), key=lambda error: mistake_order(error, _line(error, document))
        )
        line = _line(errors[0], document)
        raise RecipeError(f"{where}:{line}: {_first_of(errors, model)}") from None


def recipe_from_dict(values: object, *, where: str = "recipe") -> Recipe:
    """The inverse of `Recipe.to_dict`; absent fields take their defaults.

    Raises:
        RecipeError: unknown keys, bad values, or a scheme without the calibration it needs.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as invalid:
        raise RecipeError(f"{where}: {_first_of(mistakes_in(invalid), Recipe)}") from None


def any_recipe_from_dict(values: object, *, where: str = "recipe") -> AnyRecipe:
    """The same of a recipe that may choose widths; the inverse of `AutoRecipe.to_dict` too.

    Raises:
        RecipeError: as `recipe_from_dict`.
    """
    model = _model(values)
    try:
        return model.model_validate(values)
    except ValidationError as invalid:
        raise RecipeError(f"{where}: {_first_of(mistakes_in(invalid), model)}") from None


def _model(values: object) -> type[AnyRecipe]:
    return AutoRecipe if is_auto(values) else Recipe


def _first_of(errors: list[ErrorDetails], model: type[AnyRecipe]) -> str:
    more = f" ({len(errors) - 1} more after it)" if len(errors) > 1 else ""
    return describe_mistake(errors[0], model) + more


def _line(error: ErrorDetails, document: MarkedYaml) -> int:
    return document.line_of((*error["loc"], *_field_at_fault(error)))


def _field_at_fault(error: ErrorDetails) -> YamlPath:
    """The key within a scheme that the message names, to report that key's own line."""
    given, message = error["input"], str(error.get("ctx", {}).get("error", ""))
    if error["type"] != "value_error" or not isinstance(given, dict):
        return ()
    named = set(re.findall(r"\w+", message.partition(";")[0]))
    # "mode" comes last, since messages about other keys may mention it too.
    keys = sorted((key for key in given if str(key) in named), key=lambda key: key == "mode")
    return tuple(map(str, keys[:1]))


CALIBRATION = Calibration(texts=("hf:allenai/c4/en?split=train",))
"""General English web text, already shuffled; streamed, so only its beginning is fetched."""


@cache
def builtin_recipes() -> Mapping[str, Recipe]:
    """Every built-in recipe by its name, in alphabetical order.

    Those for stock Keras quantize the embeddings too: int8 and int4 to their own scheme, the others
    to int8. Those that other runtimes are meant to serve leave them in float: an export would store
    the dequantized table, which is as large, and less accurate.
    """
    recipes = (
        # Keras' own model.quantize takes the embeddings along, in the same scheme.
        _recipe("int8", Int8Scheme(), embeddings=Int8Scheme()),
        _recipe("int4", Int4Scheme(), embeddings=Int4Scheme()),
        _recipe("int4-g64", Int4Scheme(block_size=64), embeddings=Int4Scheme(block_size=64)),
        # Powers of two cost no accuracy in a floating-point format, and leave few mantissa bits to
        # store.
        _recipe("float8", Float8Scheme(power_of_two=True)),
        *(
            _recipe(f"gptq-w{bits}-g{size}", _gptq(bits, size))
            for bits, size in ((4, 128), (4, 64), (4, 32), (3, 128), (3, 64))
        ),
        # Two bits are of use only if each block is trained, though a run takes twenty times as long
        # on a CPU. With three, training adds next to nothing to drift correction and refits.
        *(
            _recipe(f"gptq-w2-g{size}", _best(2, size)).model_copy(update={"tuning": Tuning()})
            for size in (64, 32)
        ),
        *(
            _recipe(f"gptq-w{bits}-g{size}-best", _best(bits, size))
            for bits, size in ((4, 128), (4, 64), (3, 64))
        ),
        _recipe("gptq-w8", _gptq(8, 128)),
        *(_recipe(f"awq-w4-g{size}", AWQScheme(group_size=size)) for size in (128, 64, 32)),
        # gptq is symmetric here, since every runtime has kernels for that, in both formats of
        # checkpoints; Keras' awq is not.
        *(
            _servable(f"gptq-w{bits}-g{size}-sym", _gptq(bits, size, symmetric=True))
            for bits, size in ((4, 128), (4, 64), (4, 32), (8, 128))
        ),
        *(
            _servable(f"awq-w4-g{size}-foldable", AWQScheme(group_size=size, foldable=True))
            for size in (128, 64, 32)
        ),
    )
    return {recipe.name: recipe for recipe in sorted(recipes, key=lambda recipe: recipe.name)}


def _gptq(weight_bits: int, group_size: int, *, symmetric: bool = False) -> GPTQScheme:
    return GPTQScheme(
        weight_bits=weight_bits, group_size=group_size, symmetric=symmetric, **ACCURATE
    )


def _best(weight_bits: int, group_size: int) -> GPTQScheme:
    """More accurate still, and slower: the float model runs beside the quantized one."""
    return replace(_gptq(weight_bits, group_size), drift_correction=1.0, scale_refit=True)


def _recipe(name: str, scheme: Scheme, embeddings: Scheme | None = None) -> Recipe:
    weights_only = isinstance(scheme, Int8Scheme | Int4Scheme)
    return Recipe(
        name=name,
        scheme=scheme,
        embeddings=embeddings or Int8Scheme(),
        calibration=None if weights_only else CALIBRATION,
    )


def _servable(name: str, scheme: Scheme) -> Recipe:
    return Recipe(name=name, scheme=scheme, calibration=CALIBRATION, servable=True)
