"""A user's YAML file as plain values, with the line that each of them stands on.

YAML can build huge values from a few lines (aliases of aliases), and exhaust the stack of its
reader (deep nesting): both are refused from its stream of events, before any value is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

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
