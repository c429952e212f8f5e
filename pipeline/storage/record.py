"""Records: frozen dataclasses stored as JSON that carries its own digest.

Equal content has equal bytes, and changing a single byte makes a record unreadable, so a reader
can trust a record without knowing anything else about it.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar, Self

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pipeline.canonical import canonical_json, sha256
from pipeline.errors import DamagedObjectError, PipelineError
from pipeline.storage.object_store import ObjectStore

STRICT = ConfigDict(strict=True, extra="forbid")
"""`__pydantic_config__` of every dataclass in a record: nothing is coerced, added or ignored."""

MAX_RECORD_BYTES = 256 << 20
# Reading again repairs a bit flip in transit, but not damage at rest.
_NUM_READS = 3


class RecordError(PipelineError):
    """Bytes that differ from what was written, or that contradict themselves."""


_adapters: dict[type[Any], TypeAdapter[Any]] = {}


def adapter_of(kind: type[Any]) -> TypeAdapter[Any]:
    """What reads and writes a dataclass; built once, since that takes tens of milliseconds."""
    if kind not in _adapters:
        _adapters[kind] = TypeAdapter(kind)
    return _adapters[kind]


class StoredRecord:
    """Base of everything stored as one JSON object: a frozen, keyword-only dataclass."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def content(self) -> dict[str, Any]:
        """The record as plain JSON values, as it is stored."""
        values: dict[str, Any] = adapter_of(type(self)).dump_python(self)
        return values

    def to_json(self) -> bytes:
        """The stored bytes."""
        return with_digest(self.content())

    @property
    def record_sha256(self) -> str:
        """SHA-256 of the stored bytes."""
        return sha256(self.to_json())

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Read what `to_json` wrote.

        Raises:
            RecordError: anything else, even if only one byte differs.
        """
        content = without_digest(data)
        try:
            # From JSON, since strict validation accepts lists for tuples only there.
            record: Self = adapter_of(cls).validate_json(json.dumps(content))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise RecordError(
                f"not of this version of quantfleet ({where}: {first['msg']})"
            ) from error
        return record

    @classmethod
    def read(cls, store: ObjectStore, key: str) -> Self:
        """Read a record; repeat the read if it arrives damaged.

        Raises:
            MissingObjectError: there is no such record.
            DamagedObjectError: it is damaged at rest.
        """
        for _ in range(_NUM_READS):
            try:
                return cls.from_json(store.get(key, at_most=MAX_RECORD_BYTES))
            except RecordError as error:
                last = error
        raise DamagedObjectError(f"{store.url(key)} is damaged: {last}") from last


def with_digest(content: Any) -> bytes:
    """The stored bytes for a JSON value."""
    text = canonical_json(content)
    # As the value of a key it is the same text, deeper: line breaks in strings are escaped.
    inner = text.removesuffix(b"\n").replace(b"\n", b"\n  ")
    return b'{\n  "content": %b,\n  "sha256": "%b"\n}\n' % (inner, sha256(text).encode())


def without_digest(data: bytes) -> Any:
    """The inverse of `with_digest`.

    Raises:
        RecordError: not exactly what `with_digest` returns.
    """
    try:
        written = json.loads(data)
        content = written["content"]
        expected = with_digest(content)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"it is not JSON ({type(error).__name__})") from error
    except (KeyError, TypeError) as error:
        raise RecordError("it is JSON, but not a record") from error
    if expected != data:
        raise RecordError("its bytes do not match the digest that it carries")
    return content
