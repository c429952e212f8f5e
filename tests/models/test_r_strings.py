"""R's databases: strings are read as written, and nothing else is taken for them."""

from __future__ import annotations

import struct
import zlib

import pytest

from tests.models.r_strings import read_database, read_strings


def serialized(lines: list[bytes | None], *, version: int = 3, flags: int = 16) -> bytes:
    """As R's `serialize` writes a character vector in UTF-8."""
    head = b"X\n" + struct.pack(">iii", version, 0x40201, 0x30500)
    if version == 3:
        head += struct.pack(">i", 5) + b"UTF-8"
    body = struct.pack(">ii", flags, len(lines))
    for line in lines:
        body += struct.pack(">ii", 0x40009, -1 if line is None else len(line)) + (line or b"")
    return head + body


def entry(value: bytes) -> bytes:
    return struct.pack(">I", len(value)) + zlib.compress(value)


@pytest.mark.parametrize("version", [2, 3])
def test_every_vector_is_read_in_order(version: int) -> None:
    first, second = [b"EMMA", b"", "Café".encode()], [b"PERSUASION", None]
    content = entry(serialized(first, version=version)) + entry(serialized(second, version=version))
    assert list(read_database(content)) == [["EMMA", "", "Café"], ["PERSUASION", ""]]


def test_latin_1_is_told_by_its_flag() -> None:
    value = serialized([b"x"]).replace(
        struct.pack(">ii", 0x40009, 1) + b"x", struct.pack(">ii", 0x4009, 1) + b"\xe9"
    )
    assert read_strings(value) == ["é"]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (serialized([b"a"], flags=13), "not a plain vector of strings"),
        (serialized([b"a"], flags=16 | 1 << 9), "not a plain vector of strings"),
        (serialized([b"a"]) + b"?", "1 bytes after its end"),
        (b"A\n" + serialized([b"a"])[2:], "not serialized as XDR"),
    ],
)
def test_anything_else_is_refused(content: bytes, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        list(read_database(entry(content)))


def test_a_damaged_database_is_refused() -> None:
    content = entry(serialized([b"a" * 100]))
    with pytest.raises(ValueError, match="damaged at byte 0"):
        list(read_database(content[:-3]))
