"""Recipes from their names, from plain values and from YAML files."""

from __future__ import annotations

import difflib
import re

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from pipeline.calibration.given_files import read_given_file
from pipeline.errors import RecipeError
from pipeline.recipe.builtin_recipes import builtin_recipes
from pipeline.recipe.marked_yaml import MAX_BYTES, MarkedYaml, Place, read_yaml
from pipeline.recipe.mistakes import describe_mistake, in_turn
from pipeline.recipe.recipe import Recipe


def load_recipe(name_or_file: str) -> Recipe:
    """Return a built-in recipe by its name, or read one from a YAML file.

    Args:
        name_or_file: a built-in recipe's name; or a path or fsspec URL, which has a "/" in it or
            ends in .yaml or .yml. A file of a built-in recipe's name is read as `./name`.

    Raises:
        RecipeError: an unknown name, with those that are known; an unreadable file; or a bad
            one, with the line to mend.
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
    content = read_given_file(name_or_file, max_bytes=MAX_BYTES, kind=RecipeError)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"{name_or_file}:{line}: not UTF-8 text; save the file as UTF-8"
        ) from None
    return parse_recipe(text, where=name_or_file)


def parse_recipe(text: str, *, where: str) -> Recipe:
    """Read a recipe from YAML text.

    Raises:
        RecipeError: `where:line: what is wrong; what to do`.
    """
    document = read_yaml(text, where=where, kind=RecipeError)
    try:
        return Recipe.model_validate(document.values)
    except ValidationError as invalid:
        errors = sorted(invalid.errors(), key=lambda error: in_turn(error, _line(error, document)))
        line = _line(errors[0], document)
        raise RecipeError(f"{where}:{line}: {_first_of(errors)}") from None


def recipe_from_dict(values: object, *, where: str = "recipe") -> Recipe:
    """The inverse of `Recipe.to_dict`; absent fields take their defaults.

    Args:
        values: plain JSON values.
        where: where they come from, for messages.

    Raises:
        RecipeError: unknown keys, bad values, or schemes without the calibration they need.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as invalid:
        raise RecipeError(f"{where}: {_first_of(invalid.errors())}") from None


def _first_of(errors: list[ErrorDetails]) -> str:
    more = f" ({len(errors) - 1} more after it)" if len(errors) > 1 else ""
    return describe_mistake(errors[0], Recipe) + more


def _line(error: ErrorDetails, document: MarkedYaml) -> int:
    return document.line_of((*error["loc"], *_field_at_fault(error)))


def _field_at_fault(error: ErrorDetails) -> Place:
    """The key of a scheme that its message is about, so that the line is that key's own."""
    given, message = error["input"], str(error.get("ctx", {}).get("error", ""))
    if error["type"] != "value_error" or not isinstance(given, dict):
        return ()
    named = set(re.findall(r"\w+", message.partition(";")[0]))
    # A bad mode is named last, since every message about another key may name it too.
    keys = sorted((key for key in given if str(key) in named), key=lambda key: key == "mode")
    return tuple(map(str, keys[:1]))
