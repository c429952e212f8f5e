"""A user's YAML file as plain values, with the line that each of them stands on.

YAML can build huge values from a few lines (aliases of aliases), and exhaust the stack of its
reader (deep nesting): both are refused from its stream of events, before any value is made.

What pydantic found wrong with a user's values, in words the user can act on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import yaml
from pydantic import BaseModel
from pydantic_core import ErrorDetails

from pipeline.errors import PipelineError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 20
MAX_ALIASES = 20

Place = tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class MarkedYaml:
    """A YAML document's values and lines."""

    values: Any
    where: str
    """The file, for messages."""
    node: yaml.Node

    def line_of(self, place: Place) -> int:
        """The line, from 1, of the value at `place`, or of the nearest that holds it."""
        node, line = self.node, self.node.start_mark.line
        for step in place:
            found = _child(node, step)
            if found is None:
                break
            node, line = found
        return int(line) + 1


def read_yaml(text: str, *, where: str, kind: type[PipelineError]) -> MarkedYaml:
    """Read one document of plain values.

    Args:
        text: the YAML text.
        where: its file, for messages.
        kind: the error to raise.

    Raises:
        PipelineError: of `kind`; no YAML, no or several documents, a key given twice, tags that
            would build objects, or more bytes, depth or aliases than a written file has.
    """
    if len(text.encode()) > MAX_BYTES:
        raise kind(f"{where}:1: more than {MAX_BYTES} bytes; split the file")
    try:
        _check_events(text, where, kind)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            raise kind(f"{where}:1: the file is empty; write its keys and values")
        _check_keys(node, where, kind)
        return MarkedYaml(values=yaml.safe_load(text), where=where, node=node)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise kind(f"{where}:{line}: {error.reason}; remove that character") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = 1 if mark is None else mark.line + 1
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise kind(f"{where}:{line}: {problem}; correct the YAML there") from None
    except ValueError as error:
        # Such as a date of month 13.
        if isinstance(error, PipelineError):
            raise
        raise kind(f"{where}:1: {error}; put such values in quotes") from None


def _check_events(text: str, where: str, kind: type[PipelineError]) -> None:
    depth = num_aliases = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = 0 if event.start_mark is None else event.start_mark.line + 1
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise kind(f"{where}:{line}: nested more than {MAX_DEPTH} deep; flatten it")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.AliasEvent):
            num_aliases += 1
            if num_aliases > MAX_ALIASES:
                raise kind(
                    f"{where}:{line}: more than {MAX_ALIASES} aliases (*name); write values out"
                )


def _check_keys(root: yaml.Node, where: str, kind: type[PipelineError]) -> None:
    """Refuse a key given twice, of which YAML would silently keep the last."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:  # by an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, value in node.value:
                waiting.append(value)
                if not isinstance(key, yaml.ScalarNode):
                    continue
                if key.value in keys:
                    line = key.start_mark.line + 1
                    raise kind(f"{where}:{line}: {key.value} is given twice; remove one")
                keys.add(key.value)


def _child(node: yaml.Node, step: int | str) -> tuple[yaml.Node, int] | None:
    """The node at one step below, and the line it is found at: its key's, or its own."""
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        entry = node.value[step]
        return entry, entry.start_mark.line
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == str(step):
                return value, key.start_mark.line
    return None


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
