"""Give memory that was freed back to the system, where the C library would keep it."""

from __future__ import annotations

import ctypes

_LARGE_BYTES = 4 << 20


def hand_back() -> None:
    """What glibc's malloc holds in reserve goes back, in all threads' arenas.

    Buffers of many sizes leave gaps that the next block's do not fill, so that a worker would grow
    for some dozens of blocks by a quarter of each. Libraries without `malloc_trim` do it by
    themselves.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def make_room(num_bytes: int) -> None:
    """Hand back before work on something large, whose copies would not fit into the gaps.

    Of small things the gaps are worth more than the room: pages that come back cost time.

    Args:
        num_bytes: of what is worked on.
    """
    if num_bytes >= _LARGE_BYTES:
        hand_back()
