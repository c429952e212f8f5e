"""What pydantic found wrong with a user's values, in words the user can act on."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails


def in_turn(error: ErrorDetails, line: int) -> tuple[bool, int]:
    """To sort mistakes by: lines, but what is missing last, as it may stand there misspelled."""
    return error["type"] == "missing", line


def describe_mistake(error: ErrorDetails, model: type[BaseModel]) -> str:
    """Say which value is wrong, what was given and what is right, in one line.

    Args:
        error: one of `ValidationError.errors()`.
        model: what was validated, for the keys it has.
    """
    loc = error["loc"]
    place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in loc)
    place = place.removeprefix(".")
    given = f"got {_shortened(repr(error['input']))}"
    allowed = error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden":
            known = ", ".join(_keys(model, loc[:-1]))
            return f"unknown key {place}; the keys here are {known}"
        case "missing":
            return f"{place} is missing; add it"
        case "model_type" | "model_attributes_type":
            return f"{place or 'this'} must be a mapping of keys to values, {given}"
        case "tuple_type" | "list_type":
            return f"{place} must be a list, {given}; write - before each entry"
        case "int_type":
            return f"{place} must be a whole number, {given}; write it without quotes or a point"
        case "bool_type":
            return f"{place} must be true or false, {given}; write it without quotes"
        case "string_type":
            return f"{place} must be text, {given}; put it in quotes"
        case "too_short" | "string_too_short":
            return f"{place} is empty; give at least {allowed['min_length']}"
        case "too_long" | "string_too_long":
            return f"{place} is too long; at most {allowed['max_length']} are allowed"
        case "greater_than_equal":
            return f"{place} must be at least {allowed['ge']}, {given}; raise it"
        case "less_than_equal":
            return f"{place} must be at most {allowed['le']}, {given}; lower it"
        case "less_than":
            return f"{place} must be less than {allowed['lt']}, {given}; lower it"
        case "string_pattern_mismatch":
            return f"{place} must match {allowed['pattern']}, {given}; rename it"
        case "literal_error":
            return f"{place} must be {allowed['expected']}, {given}; choose one of them"
        case "value_error":
            # Our own validators, and the schemes', say what to do themselves.
            return f"{place}: {allowed['error']}".removeprefix(": ")
    return f"{place}: {error['msg']}, {given}; correct it"


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def _keys(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The keys of the mapping at `loc`, found through the annotations on the way."""
    for step in loc:
        if isinstance(step, str) and step in model.model_fields:
            model = _model_in(model.model_fields[step].annotation) or model
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)
