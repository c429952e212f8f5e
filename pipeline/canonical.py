"""Canonical JSON: equal values have equal bytes, and so equal digests."""

from __future__ import annotations

import hashlib
import math
from json.encoder import encode_basestring as _quoted
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
    try:
        return (_written(value, "\n") + "\n").encode("utf-8")
    except (TypeError, ValueError):  # to which an encoding's errors belong
        _check(value, "$")
        raise


def sha256(data: bytes | memoryview) -> str:
    """SHA-256 of `data` as 64 lower-case hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def digest_of(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`."""
    return sha256(canonical_json(value))


def _written(value: object, line: str) -> str:
    """What `json.dumps` makes of `value`, with sorted keys and an indent of 2.

    In less than half its time: where it indents, generators within generators yield each word.
    Plans and records, read and written again and again, are a third of a small model's run.

    Args:
        line: begins a line as deep as the value.

    Raises:
        TypeError, ValueError: JSON cannot hold it.
    """
    match value:
        case str():
            return _quoted(value)
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int():
            return int.__repr__(value)
        case float() if math.isfinite(value):
            return float.__repr__(value)
        case dict():
            inner = line + "  "
            # Raises for the keys 1 and True, which json.dumps would silently turn into text.
            items = [f"{_quoted(key)}: {_written(value[key], inner)}" for key in sorted(value)]
            return f"{{{inner}{f',{inner}'.join(items)}{line}}}" if items else "{}"
        case list() | tuple():
            inner = line + "  "
            items = [_written(item, inner) for item in value]
            return f"[{inner}{f',{inner}'.join(items)}{line}]" if items else "[]"
    raise TypeError


def _check(value: object, where: str) -> None:
    """Say what JSON cannot hold, and where it is."""
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
