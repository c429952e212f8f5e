"""Canonical JSON: equal values have equal bytes, and so equal digests."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from pipeline.errors import PipelineError


class CanonicalJsonError(PipelineError):
    """A value that has no canonical JSON form."""


def canonical_json(value: Any) -> bytes:
    """The JSON text of `value` with sorted keys, indented, in UTF-8, with a final newline.

    Floats read back as the same floats. Tuples become lists.

    Raises:
        CanonicalJsonError: NaN or infinity, a key that is not a string, a lone surrogate, or a
            type that JSON lacks.
    """
    _check(value, "$")
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, indent=2)
    return text.encode("utf-8") + b"\n"


def sha256(data: bytes | memoryview) -> str:
    """SHA-256 of `data` as 64 lower-case hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def digest_of(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`."""
    return sha256(canonical_json(value))


def _check(value: object, where: str) -> None:
    # json.dumps would silently turn the keys 1 and True into text, and never says where.
    match value:
        case None | bool() | int():
            pass
        case float():
            if not math.isfinite(value):
                raise CanonicalJsonError(f"{where} is {value}, which JSON cannot hold; use null")
        case str():
            _check_text(value, where)
        case dict():
            for key, item in value.items():
                if not isinstance(key, str):
                    raise CanonicalJsonError(f"{where} has the key {key!r}; keys must be strings")
                _check_text(key, f"a key of {where}")
                _check(item, f"{where}.{key}")
        case list() | tuple():
            for i, item in enumerate(value):
                _check(item, f"{where}[{i}]")
        case _:
            raise CanonicalJsonError(
                f"{where} is a {type(value).__name__}, which JSON lacks; convert it to a plain "
                "number, text, list or dict first"
            )


def _check_text(text: str, where: str) -> None:
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise CanonicalJsonError(
            f"{where} contains half a surrogate pair, which is not Unicode text"
        )
