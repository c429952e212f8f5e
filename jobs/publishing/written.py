"""Reading and writing the small records of publishing: strict, self-checked, size-capped."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pipeline.canonical import canonical_json
from pipeline.self_checked import RecordError, with_digest, without_digest

STRICT = ConfigDict(strict=True, extra="forbid")


class Written:
    """A frozen dataclass that is stored as JSON with its own digest.

    A subclass sets `__pydantic_config__` to STRICT.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def to_json(self) -> bytes:
        """The bytes that stand for it; the same content always has the same ones."""
        return with_digest(dataclasses.asdict(self))  # type: ignore[call-overload]


_T = TypeVar("_T", bound=Written)


def read_as(kind: type[_T], data: bytes) -> _T:
    """Read what `to_json` wrote.

    Raises:
        RecordError: anything else; a single other byte is enough.
    """
    content: Any = without_digest(data)
    try:
        return TypeAdapter(kind).validate_json(canonical_json(content))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise RecordError(f"not of this version of quantfleet ({place}: {first['msg']})") from error
