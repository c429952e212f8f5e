import time
from typing import Any

import pytest

from pipeline.executor import protocol
from pipeline.executor.protocol import TimedWorker, argument, group_of
from pipeline.run.worker_api import WorkerApi
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


def test_no_seconds_are_lost_that_are_taken_while_a_call_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One thread asks at the moment at which another adds."""
    worker = TimedWorker(Adder())
    taken: list[dict[str, float]] = []
    clock = iter([1.0, 3.0])

    class Clock:
        @staticmethod
        def perf_counter() -> float:
            taken.append(worker.take_seconds())
            return next(clock)

    monkeypatch.setattr(protocol, "time", Clock)
    worker.call("add", 1, 1)
    assert [*taken, worker.take_seconds()] == [{}, {}, {"add": 2.0}]


def test_what_waits_for_storage_runs_beside_what_computes() -> None:
    groups: dict[str, Any] = {
        name: group_of(getattr(WorkerApi, name))
        for name in vars(WorkerApi)
        if not name.startswith("_")
    }
    assert {name: group for name, group in groups.items() if group} == {
        "read": "read",
        "commit": "commit",
        "settle": "commit",
    }
