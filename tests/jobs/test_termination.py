"""SIGTERM ends a block like Ctrl-C, once, and is told apart from it."""

from __future__ import annotations

import os
import signal

import pytest

from jobs.termination import Terminated, terminable


def test_sigterm_ends_the_block_and_the_end_is_not_disturbed() -> None:
    ended = []

    def work() -> None:
        with terminable():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                signal.pause()
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                ended.append(True)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated):
        work()
    assert ended
    assert signal.getsignal(signal.SIGTERM) is before


def test_it_is_known_even_where_a_library_raises_something_plainer() -> None:
    def work() -> None:
        with terminable():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                signal.pause()
            except Terminated:
                raise KeyboardInterrupt from None

    with pytest.raises(Terminated):
        work()


def test_ctrl_c_stays_ctrl_c() -> None:
    def work() -> None:
        with terminable():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
