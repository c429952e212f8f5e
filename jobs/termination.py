"""An orderly end on SIGTERM, which a machine that shuts down, or a cluster, sends, and on Ctrl-C.

A signal's handler raises in whatever runs at that moment. Some of that loses what is raised, or
makes another error of it: Ray's calls, and Python's finalizers and callbacks. And Ray replaces the
handlers of SIGTERM, also below Python. So SIGTERM is blocked in every thread but one, which waits
for it and passes it on as a signal that nobody else handles.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any


class Terminated(BaseException):
    """SIGTERM was received; it is to a machine what KeyboardInterrupt is to a person."""


_PASSED_ON = signal.SIGRTMIN + 5
_ENDS: Mapping[int, type[BaseException]] = {
    signal.SIGTERM: Terminated,  # in threads that are older than the block
    _PASSED_ON: Terminated,
    signal.SIGINT: KeyboardInterrupt,
}
_EXIT_CODES: Mapping[type[BaseException], int] = {Terminated: 143, KeyboardInterrupt: 130}
_CLEANUP_SECONDS = 10.0
_AGAIN_SECONDS = 0.05


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


# Ray's processes are to be ended by it.
os.register_at_fork(after_in_child=_unblock)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """End the block with Terminated when SIGTERM comes, with KeyboardInterrupt on Ctrl-C.

    SIGTERM raises only once, so that cleaning up goes on. Where that takes more than ten seconds,
    the process ends at once, with the exit code that a shell gives for the signal. Ctrl-C stays
    ignored where it was, as in background processes. To be used in the main thread.
    """
    ending = _Ending()
    numbers = [n for n in _ENDS if n != signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]
    hook, sys.unraisablehook = sys.unraisablehook, ending.unraisable
    before = {number: signal.signal(number, ending.handle) for number in numbers}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    waiting = threading.Thread(target=ending.pass_on, name="sigterm", daemon=True)
    waiting.start()
    try:
        yield
    except BaseException as error:
        if ending.exception is not None and not isinstance(error, ending.exception):
            raise ending.exception from error
        raise
    finally:
        ending.close(waiting)
        if ending.exception is not None:
            # What else came meanwhile has had its end: it is not for the handler of before.
            while signal.sigtimedwait({signal.SIGTERM}, 0):
                pass
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        sys.unraisablehook = hook


class _Ending:
    """How the block ends.

    Attributes:
        exception: that it ends with; None until a signal comes.
    """

    def __init__(self) -> None:
        self.exception: type[BaseException] | None = None
        self._is_lost = self._is_closed = False
        self._report_unraisable = sys.unraisablehook
        self._timers: list[threading.Timer] = []

    def handle(self, number: int, _frame: FrameType | None) -> None:
        if self._is_closed:
            return
        if self.exception is None:
            self.exception = _ENDS[number]
            self._later(_CLEANUP_SECONDS, os._exit, _EXIT_CODES[self.exception])
        elif number != signal.SIGINT and not self._is_lost:
            return
        self._is_lost = False
        raise self.exception

    def pass_on(self) -> None:
        """Wait for SIGTERM, in a thread of its own."""
        while signal.sigwait({signal.SIGTERM}) and not self._is_closed:
            _send(threading.main_thread(), _PASSED_ON)
            # What comes just before the thread begins to wait for something does not end the wait.
            while self.exception is None and not self._is_closed:
                time.sleep(_AGAIN_SECONDS)
                _send(threading.main_thread(), _PASSED_ON)

    def unraisable(self, found: sys.UnraisableHookArgs) -> None:
        """Raise again what was raised where nothing can be: in a finalizer, for one."""
        if self.exception is None or not isinstance(found.exc_value, self.exception):
            self._report_unraisable(found)
            return
        self._is_lost = True
        self._later(_AGAIN_SECONDS, _send, threading.main_thread(), _PASSED_ON)

    def close(self, waiting: threading.Thread) -> None:
        """End all threads; the block has ended."""
        self._is_closed = True
        _send(waiting, signal.SIGTERM)
        for timer in self._timers:
            timer.cancel()
        for thread in (*self._timers, waiting):
            thread.join()

    def _later(self, seconds: float, function: Any, *arguments: object) -> None:
        timer = threading.Timer(seconds, function, arguments)
        timer.daemon = True
        timer.start()
        self._timers.append(timer)


def _send(thread: threading.Thread, number: int) -> None:
    assert thread.ident is not None
    signal.pthread_kill(thread.ident, number)
