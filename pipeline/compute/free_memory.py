"""Give memory that was freed back to the system, where the C library would keep it."""

from __future__ import annotations

import ctypes


def hand_back() -> None:
    """What glibc's malloc holds in reserve goes back, in all threads' arenas.

    Buffers of many sizes leave gaps that the next block's do not fill, so that a worker would grow
    for some dozens of blocks by a quarter of each. Libraries without `malloc_trim` do it by
    themselves.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
