import threading
from collections.abc import Iterator

import jax
import pytest

from pipeline.compute.overlapped import AT_ONCE, overlapped


def alive() -> int:
    return sum(thread.name.startswith("batch") for thread in threading.enumerate())


def test_results_come_in_the_order_of_their_items_whoever_ends_first():
    second_ended = threading.Event()

    def wait_for_the_second(item: int) -> int:
        if item == 0:
            assert second_ended.wait(10)
        if item == 1:
            second_ended.set()
        return item * item

    assert list(overlapped(wait_for_the_second, range(7))) == [n * n for n in range(7)]
    assert alive() == 0


def test_no_more_are_begun_than_can_run_while_one_is_taken():
    begun: list[int] = []
    results = overlapped(lambda item: begun.append(item) or item, range(20))
    for taken in range(20):
        assert next(results) == taken
        assert len(begun) <= taken + 1 + AT_ONCE


def test_what_fails_is_told_in_its_turn():
    def divide(item: int) -> float:
        return 1 / item

    results = overlapped(divide, [2, 1, 0, 4])
    assert [next(results), next(results)] == [0.5, 1.0]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert alive() == 0


def test_who_stops_taking_leaves_no_thread_behind():
    results = overlapped(abs, range(10))
    next(results)
    assert alive() > 0
    results.close()
    assert alive() == 0


def test_an_accelerator_is_given_one_item_after_the_other(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    callers: set[str] = set()

    def note(item: int) -> int:
        callers.add(threading.current_thread().name)
        return item

    results: Iterator[int] = overlapped(note, range(3))
    assert list(results) == [0, 1, 2]
    assert callers == {threading.current_thread().name}
