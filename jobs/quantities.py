"""Numbers as people read them."""

from __future__ import annotations


def size(num_bytes: float) -> str:
    """Bytes, as 12.3 MiB."""
    return _scaled(num_bytes, 1024.0, ("B", "KiB", "MiB", "GiB", "TiB"))


def count(number: float) -> str:
    """A large count, as 12.3 T."""
    return _scaled(number, 1000.0, ("", "k", "M", "G", "T", "P", "E")).rstrip()


def duration(seconds: float) -> str:
    """Seconds, as 12 s, 3 min or 1.5 h."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _scaled(value: float, step: float, units: tuple[str, ...]) -> str:
    index = 0
    while abs(value) >= step and index + 1 < len(units):
        value /= step
        index += 1
    return f"{value:.0f} {units[index]}" if index == 0 else f"{value:.1f} {units[index]}"
