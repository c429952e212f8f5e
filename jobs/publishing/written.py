"""What the small records of publishing have in common: strict, and with their own digest."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from pydantic import ConfigDict

from pipeline.self_checked import with_digest

STRICT = ConfigDict(strict=True, extra="forbid")


class Written:
    """A frozen dataclass that is stored as JSON with its own digest.

    A subclass sets `__pydantic_config__` to STRICT.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def to_json(self) -> bytes:
        """The bytes that stand for it; the same content always has the same ones."""
        return with_digest(dataclasses.asdict(self))  # type: ignore[call-overload]
