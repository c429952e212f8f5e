"""Give memory that was freed back to the system, where the C library would keep it."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

_LARGE_BYTES = 16 << 20
_MOST_GROWTH_BYTES = 16 << 20
_STATM = Path("/proc/self/statm")


class FreedMemory:
    """What a process has freed and not yet handed back, watched between pieces of like work.

    Buffers of many sizes leave gaps that those of the next block do not fill, so that a worker
    would grow for some dozens of blocks by a quarter of each. To hand back after every block is no
    remedy: pages that come back cost a tenth of a small block's time.
    """

    def __init__(self) -> None:
        self._least: int | None = None

    def limit(self) -> None:
        """Hand back if the process has grown by more than 16 MiB since it was smallest here.

        Also the first time, when what was needed to begin lies free, and wherever nobody can say
        how large the process is.
        """
        resident = _resident_bytes()
        if resident is None or self._least is None:
            hand_back()
            self._least = resident
            return
        if resident > self._least + _MOST_GROWTH_BYTES:
            hand_back()
        self._least = min(self._least, resident)


def hand_back() -> None:
    """What glibc's malloc holds in reserve goes back, in all threads' arenas.

    Libraries without `malloc_trim` do it by themselves.
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


def _resident_bytes() -> int | None:
    """Memory that the process has now; None where the system does not say."""
    try:
        pages = int(_STATM.read_text().split()[1])
    except OSError:
        return None
    return pages * mmap.PAGESIZE
