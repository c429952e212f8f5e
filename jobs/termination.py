"""An orderly end when the machine, or the cluster, asks for one."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Terminated(BaseException):
    """SIGTERM arrived: like Ctrl-C, only that nobody sits at the terminal."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Raise Terminated in the block when SIGTERM comes; once, so that the end is not disturbed.

    Enter it after Ray was started or joined, which installs a handler of its own.
    """
    came = False

    def terminate(_number: int, _frame: FrameType | None) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt:
        if came:  # Ray turns what a handler raises into a plain one
            raise Terminated from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
