import time

import pytest

from pipeline.executor.protocol import TimedWorker, argument
from tests.pipeline.local_executor import LocalExecutor


class Adder:
    def add(self, left: int, right: int) -> int:
        return left + right

    def fail(self) -> None:
        time.sleep(0.01)
        raise KeyError("mine")


def test_handles_stand_for_results() -> None:
    executor = LocalExecutor([Adder(), Adder()])
    first = executor.submit(0, Adder.add, 1, 2)
    assert executor.fetch([executor.submit(1, Adder.add, argument(first), 4)]) == [7]


def test_seconds_are_counted_once_and_of_failures_too() -> None:
    executor = LocalExecutor([Adder(), Adder()])
    executor.submit(0, Adder.add, 1, 2)
    with pytest.raises(KeyError, match="mine"):
        executor.submit(1, Adder.fail)
    taken = executor.take_seconds()
    assert set(taken) == {"add", "fail"}
    assert taken["fail"] >= 0.01
    assert executor.take_seconds() == {}


def test_a_timed_worker_adds_up_by_method() -> None:
    worker = TimedWorker(Adder())
    for _ in range(3):
        worker.call("add", 1, 1)
    assert set(worker.take_seconds()) == {"add"}
    assert worker.take_seconds() == {}
