"""Vectors of strings in the lazy-load database of an R package (data/Rdata.rdb).

Each object there is its unserialized size, big-endian in 4 bytes, and a zlib stream of R's
serialization: version 2 or 3, in XDR ("R Internals", 1.8). Only character vectors without
attributes are read, which is what texts are kept as.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

_STRING, _STRINGS = 9, 16  # SEXP types: CHARSXP, STRSXP
_LATIN1 = 1 << (12 + 2)  # of a CHARSXP's flags
_HAS_ATTRIBUTES = 1 << 9


def read_database(content: bytes) -> Iterator[list[str]]:
    """Yield every object in a database, in its order.

    Raises:
        ValueError: an object is damaged, or anything but strings.
    """
    place = 0
    while place < len(content):
        stream = zlib.decompressobj()
        try:
            [size] = struct.unpack_from(">I", content, place)
            value = stream.decompress(content[place + 4 :]) + stream.flush()
        except (struct.error, zlib.error) as error:
            raise ValueError(f"R database: damaged at byte {place}: {error}") from None
        if len(value) != size or not stream.eof:
            raise ValueError(f"R database: damaged at byte {place}: {len(value)} of {size} bytes")
        yield read_strings(value)
        place = len(content) - len(stream.unused_data)


def read_strings(content: bytes) -> list[str]:
    """One serialized vector of strings; a missing one (NA) is the empty string."""
    version = struct.unpack_from(">i", content, 2)[0] if content[:2] == b"X\n" else None
    if version not in (2, 3):
        raise ValueError("R object: not serialized as XDR of version 2 or 3")
    place = 14  # past the format, and the versions of the format, writer and oldest reader
    if version == 3:
        place += 4 + struct.unpack_from(">i", content, place)[0]  # the native encoding's name
    flags, count = struct.unpack_from(">Ii", content, place)
    if flags & 0xFF != _STRINGS or flags & _HAS_ATTRIBUTES:
        raise ValueError(f"R object: flags {flags:#x} are not a plain vector of strings")
    place += 8
    found = []
    for _ in range(count):
        flags, length = struct.unpack_from(">Ii", content, place)
        if flags & 0xFF != _STRING:
            raise ValueError(f"R object: flags {flags:#x} are not a string")
        place += 8
        text = content[place : place + max(length, 0)]
        found.append(text.decode("latin-1" if flags & _LATIN1 else "utf-8"))
        place += max(length, 0)
    if place != len(content):
        raise ValueError(f"R object: {len(content) - place} bytes after its end")
    return found
