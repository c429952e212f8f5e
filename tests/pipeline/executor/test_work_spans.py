from __future__ import annotations

import time

import pytest

from pipeline.executor import work_spans
from pipeline.executor.work_spans import TimedWorker, WorkSpan, coarse, seconds_by_stage
from tests.pipeline.local_executor import LocalExecutor


class Adder:
    def add(self, left: int, right: int) -> int:
        return left + right

    def fail(self) -> None:
        time.sleep(0.01)
        raise KeyError("mine")


def spell(stage: str, seconds: float, *, start: float = 0.0, worker: int = 0) -> WorkSpan:
    return WorkSpan(stage=stage, worker=worker, start=start, end=start + seconds, seconds=seconds)


def test_work_is_told_once_and_of_failures_too() -> None:
    executor = LocalExecutor([Adder(), Adder()])
    before = time.time()
    executor.submit(0, Adder.add, 1, 2)
    with pytest.raises(KeyError, match="mine"):
        executor.submit(1, Adder.fail)
    taken = executor.take_work()
    assert [(one.stage, one.worker) for one in taken] == [("add", 0), ("fail", 1)]
    assert taken[1].seconds >= 0.01
    assert before <= taken[0].start <= taken[0].end <= taken[1].end
    assert executor.take_work() == []


def test_no_work_is_lost_that_is_taken_while_a_call_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread asks at the moment at which another adds."""
    worker = TimedWorker(Adder())
    taken: list[list[WorkSpan]] = []
    clock = iter([1.0, 3.0])

    class Clock:
        @staticmethod
        def time() -> float:
            return 50.0

        @staticmethod
        def perf_counter() -> float:
            taken.append(worker.take_work())
            return next(clock)

    monkeypatch.setattr(work_spans, "time", Clock)
    worker.call("add", 1, 1)
    assert [*taken, worker.take_work()] == [[], [], [spell("add", 2.0, start=50.0)]]


def test_seconds_add_up_by_stage() -> None:
    spans = [spell("add", 1.0), spell("read", 4.0), spell("add", 0.5, worker=1)]
    assert seconds_by_stage(spans) == {"add": 1.5, "read": 4.0}


def test_short_pauses_are_joined_over_and_no_work_is_lost() -> None:
    spans = [
        spell("solve", 1.0, start=0.0),
        spell("read", 9.0, start=0.5),  # beside it
        spell("solve", 2.0, start=1.01),
        spell("solve", 3.0, start=90.0),
        spell("solve", 1.0, start=1.0, worker=1),
        spell("solve", 10.0, start=90.0, worker=1),
    ]
    assert coarse(reversed(spans), 99) == (
        WorkSpan(stage="solve", start=0.0, end=3.01, seconds=3.0),
        *(spans[i] for i in (1, 4, 3, 5)),
    )


@pytest.mark.parametrize("most", [1, 4, 60])
def test_no_more_spans_are_left_than_asked_for_or_one_by_worker_and_stage(most: int) -> None:
    spans = [
        spell(("solve", "capture")[i % 2], 0.5, start=1.0 * i, worker=worker)
        for worker in range(2)
        for i in range(100)
    ]
    found = coarse(spans, most)
    assert 4 <= len(found) <= max(4, most)
    assert seconds_by_stage(found) == seconds_by_stage(spans)
    assert {(one.stage, one.worker) for one in found} == {(s.stage, s.worker) for s in spans}
    assert coarse([], most) == ()
