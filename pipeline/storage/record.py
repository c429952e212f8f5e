"""JSON objects that carry their own digest, so that a reader who knows nothing can trust them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from pipeline.canonical import canonical_json, digest_of
from pipeline.errors import DamagedObjectError, PipelineError
from pipeline.storage.object_store import ObjectStore

_T = TypeVar("_T")

MOST_BYTES = 256 << 20
"""Nothing of the kind is larger; whoever reads one need not take in more."""
# A bit that flipped on the way is right at the next read; one at rest is not.
_NUM_READS = 3


class RecordError(PipelineError):
    """Bytes that are not as we wrote them, or that contradict themselves."""


def with_digest(content: Any) -> bytes:
    """Return the bytes that stand for a JSON value."""
    return canonical_json({"content": content, "sha256": digest_of(content)})


def without_digest(data: bytes) -> Any:
    """Return the value that `with_digest` was given.

    Raises:
        RecordError: anything but its own writing, to the last byte.
    """
    try:
        written = json.loads(data)
        content = written["content"]
        expected = with_digest(content)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"it is no JSON ({type(error).__name__})") from error
    except (KeyError, TypeError) as error:
        raise RecordError("it is JSON, but no record") from error
    if expected != data:
        raise RecordError("its bytes do not match the digest that it carries")
    return content


def read_as(kind: type[_T], data: bytes) -> _T:
    """Read a dataclass whose `asdict` was given to `with_digest`; `kind` says how strictly.

    Raises:
        RecordError: anything else; a single other byte is enough.
    """
    content = without_digest(data)
    try:
        # As JSON: strict validation takes lists for tuples there.
        return TypeAdapter(kind).validate_json(canonical_json(content))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise RecordError(f"not of this version of quantfleet ({place}: {first['msg']})") from error


def read_self_checked(store: ObjectStore, key: str, parse: Callable[[bytes], _T]) -> _T:
    """Read an object, again if it arrives damaged.

    Args:
        parse: raises RecordError where the bytes are not as they were written.

    Raises:
        MissingObjectError: nothing is there.
        DamagedObjectError: it is damaged where it lies.
    """
    for _ in range(_NUM_READS):
        try:
            return parse(store.get(key, at_most=MOST_BYTES))
        except RecordError as error:
            last = error
    raise DamagedObjectError(f"{store.url(key)} is damaged: {last}") from last
