"""A user's YAML file as plain values with their line numbers, and its mistakes in plain words.

A few lines of YAML can build huge values (aliases of aliases) or exhaust the parser's stack (deep
nesting). Both are rejected while reading the event stream, before any value is built.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipeline.errors import PipelineError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 20
MAX_ALIASES = 20

YamlPath = tuple[int | str, ...]
"""The keys and list indices that lead to a value."""

UNION_TAG = "as:"
"""Begins the tags of unions, which pydantic counts among the keys that lead to a value."""
_KEY = "[key]"
"""What pydantic puts behind a key that is itself at fault."""


@dataclass(frozen=True, kw_only=True)
class MarkedYaml:
    """A YAML document: its values, and the nodes that know their lines."""

    values: Any
    where: str
    node: yaml.Node

    def line_of(self, path: YamlPath) -> int:
        """Line, counted from 1, of the value at `path`, or of its innermost existing parent."""
        node, line = self.node, self.node.start_mark.line
        for step in path:
            found = _child(node, step)
            if found is None:
                break
            node, line = found
        return int(line) + 1


def read_yaml(
    text: str, *, where: str, error_type: type[PipelineError], max_bytes: int = MAX_BYTES
) -> MarkedYaml:
    """Read one document of plain values.

    Raises:
        PipelineError: an `error_type`: invalid YAML, no document or several, a duplicate key, tags
            that would build objects, or more bytes, nesting or aliases than a person writes.
    """
    if len(text.encode()) > max_bytes:
        raise error_type(f"{where}:1: more than {max_bytes} bytes; split the file")
    try:
        if yaml.__with_libyaml__:
            # Ten times as fast; what is wrong is told in the words of the other.
            with suppress(yaml.YAMLError, ValueError):
                return _read(text, where, error_type, yaml.CSafeLoader)
        return _read(text, where, error_type, yaml.SafeLoader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise error_type(f"{where}:{line}: {error.reason}; remove that character") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = 1 if mark is None else mark.line + 1
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise error_type(f"{where}:{line}: {problem}; correct the YAML there") from None
    except ValueError as error:
        # A date in month 13, for example.
        if isinstance(error, PipelineError):
            raise
        raise error_type(f"{where}:1: {error}; put such values in quotes") from None


def _read(
    text: str,
    where: str,
    error_type: type[PipelineError],
    kind: type[yaml.SafeLoader | yaml.CSafeLoader],
) -> MarkedYaml:
    _check_events(text, where, error_type, kind)
    loader = kind(text)
    try:
        node = loader.get_single_node()
        if node is None:
            raise error_type(f"{where}:1: the file is empty; write its keys and values")
        _check_keys(node, where, error_type)
        return MarkedYaml(values=loader.construct_document(node), where=where, node=node)
    finally:
        loader.dispose()


def _check_events(
    text: str,
    where: str,
    error_type: type[PipelineError],
    kind: type[yaml.SafeLoader | yaml.CSafeLoader],
) -> None:
    depth = num_aliases = 0
    for event in yaml.parse(text, Loader=kind):
        line = 0 if event.start_mark is None else event.start_mark.line + 1
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise error_type(f"{where}:{line}: nested more than {MAX_DEPTH} deep; flatten it")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.AliasEvent):
            num_aliases += 1
            if num_aliases > MAX_ALIASES:
                raise error_type(
                    f"{where}:{line}: more than {MAX_ALIASES} aliases (*name); write values out"
                )


def _check_keys(root: yaml.Node, where: str, error_type: type[PipelineError]) -> None:
    """Reject duplicate keys: PyYAML would silently keep the last one."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:  # an alias of a node already checked
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
                    raise error_type(f"{where}:{line}: {key.value} is given twice; remove one")
                keys.add(key.value)


def _child(node: yaml.Node, step: int | str) -> tuple[yaml.Node, int] | None:
    """The node one step down, and its line (its key's line within a mapping)."""
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        entry = node.value[step]
        return entry, entry.start_mark.line
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == str(step):
                return value, key.start_mark.line
    return None


def mistakes_in(invalid: ValidationError) -> list[ErrorDetails]:
    """What is wrong, each at the keys and indices that a person wrote."""
    found = invalid.errors()
    for error in found:
        steps = error["loc"]
        error["loc"] = tuple(step for step in steps if not str(step).startswith(UNION_TAG))
    return found


def mistake_order(error: ErrorDetails, line: int) -> tuple[bool, int]:
    """Sort key: by line, but missing keys last, since an unknown key may be a misspelled one."""
    return error["type"] == "missing", line


def describe_mistake(error: ErrorDetails, model: type[BaseModel]) -> str:
    """One line that says which value is wrong, what was given, and what is allowed.

    Args:
        error: one of `ValidationError.errors()`.
        model: the model that was validated.
    """
    loc = error["loc"]
    is_key = loc[-1:] == (_KEY,)
    steps = loc[:-2] if is_key else loc
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    path = path.removeprefix(".")
    path = f"a key of {path}" if is_key else path
    given = repr(error["input"])
    given = f"got {given}" if len(given) <= 80 else f"got {given[:77]}..."
    if error["type"] == "extra_forbidden":
        return f"unknown key {path}; the keys here are {', '.join(_keys(model, loc[:-1]))}"
    if error["type"] == "value_error":
        # The messages of our own validators are complete.
        return f"{path}: {error['ctx']['error']}".removeprefix(": ")
    template = _MISTAKES.get(error["type"], "{path}: {msg}, {given}; correct it")
    facts = {"path": path or "this", "given": given, "msg": error["msg"], **error.get("ctx", {})}
    return template.format_map(facts)


_MISTAKES = {
    "missing": "{path} is missing; add it",
    "model_type": "{path} must be a mapping of keys to values, {given}",
    "model_attributes_type": "{path} must be a mapping of keys to values, {given}",
    "tuple_type": "{path} must be a list, {given}; write - before each entry",
    "list_type": "{path} must be a list, {given}; write - before each entry",
    "int_type": "{path} must be a whole number, {given}; write it without quotes or a point",
    "float_type": "{path} must be a number, {given}; write it without quotes, 1e-2 as 1.0e-2",
    "finite_number": "{path} must be finite, {given}; correct it",
    "bool_type": "{path} must be true or false, {given}; write it without quotes",
    "string_type": "{path} must be text, {given}; put it in quotes",
    "too_short": "{path} is empty; give at least {min_length}",
    "string_too_short": "{path} is empty; give at least {min_length}",
    "too_long": "{path} is too long; at most {max_length} are allowed",
    "string_too_long": "{path} is too long; at most {max_length} are allowed",
    "greater_than": "{path} must be greater than {gt:g}, {given}; raise it",
    "greater_than_equal": "{path} must be at least {ge}, {given}; raise it",
    "less_than_equal": "{path} must be at most {le}, {given}; lower it",
    "less_than": "{path} must be less than {lt}, {given}; lower it",
    "string_pattern_mismatch": "{path} must match {pattern}, {given}; rename it",
    "literal_error": "{path} must be {expected}, {given}; choose one of them",
}
"""What to say for each of pydantic's types of error."""


def _keys(model: type[BaseModel], loc: YamlPath) -> list[str]:
    """The known keys of the mapping at `loc`, found by following the annotations."""
    for step in loc:
        if isinstance(step, str):
            field = model.model_fields.get(step)
            inner = _extra_of(model) if field is None else field.annotation
            model = _model_in(inner) or model
    return list(model.model_fields)


def _extra_of(model: type[BaseModel]) -> Any:
    """The type of a model's keys that are no fields; None where it allows none."""
    if model.model_config.get("extra") != "allow":
        return None
    return get_type_hints(model).get("__pydantic_extra__")


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)
