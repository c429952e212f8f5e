"""An orderly end when the machine, or the cluster, asks for one."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived: like Ctrl-C, only that nobody sits at the terminal."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Raise Terminated in the block when SIGTERM comes; once, so that the end is not disturbed.

    Enter it after Ray was started or joined, which installs a handler of its own.
    """

    def terminate(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
