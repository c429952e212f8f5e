"""An orderly end on SIGTERM, which a machine that shuts down, or a cluster, sends."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Terminated(BaseException):
    """SIGTERM was received; it is to a machine what KeyboardInterrupt is to a person."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Raise Terminated in the block when SIGTERM comes; only once, so that cleaning up goes on."""
    received = False

    def terminate(_number: int, _frame: FrameType | None) -> None:
        nonlocal received
        received = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt:
        if received:  # Ray turns what a handler raises into a KeyboardInterrupt
            raise Terminated from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
