"""Return freed memory to the system where the C library would keep it."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

_LARGE_BYTES = 16 << 20
_MAX_GROWTH_BYTES = 16 << 20
_STATM = Path("/proc/self/statm")


class FreedMemory:
    """Bounds the memory that a process has freed but still holds, between similar pieces of work.

    Buffers of many sizes leave gaps that those of the next block do not fill, so that a worker
    would grow for some dozens of blocks by a quarter of each. Returning memory after every block
    is too slow: mapping the pages again costs a tenth of a small block's time.
    """

    def __init__(self) -> None:
        self._smallest: int | None = None

    def limit(self) -> None:
        """Return memory if the process has grown by more than 16 MiB over its smallest size here.

        Also the first time, since starting up has freed much, and wherever the system does not say
        how large the process is.
        """
        resident = _resident_bytes()
        smallest = self._smallest
        if resident is None or smallest is None or resident > smallest + _MAX_GROWTH_BYTES:
            hand_back()
        if resident is not None:
            self._smallest = min(resident, smallest or resident)


def hand_back() -> None:
    """Make glibc's malloc return the free memory of all threads; other C libraries do so anyway."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def make_room(num_bytes: int) -> None:
    """Return memory before work on a large array, whose copies would not fit into the gaps.

    For small arrays the time to map pages again costs more than the memory is worth.
    """
    if num_bytes >= _LARGE_BYTES:
        hand_back()


def _resident_bytes() -> int | None:
    """The process's resident memory; None where the system does not say."""
    try:
        pages = int(_STATM.read_text().split()[1])
    except OSError:
        return None
    return pages * mmap.PAGESIZE
