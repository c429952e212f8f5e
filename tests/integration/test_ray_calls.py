"""Lost calls are repeated, with what depends on them and nothing else, on a real cluster."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from ray import exceptions

from pipeline.executor.protocol import Allocation
from pipeline.executor.ray_calls import (
    PING_GROUP,
    Call,
    LostCallError,
    PendingCalls,
    ask_all,
    result_of,
)
from pipeline.executor.ray_executor import RayExecutor
from pipeline.run.worker_api import WorkerApi

pytestmark = pytest.mark.ray


class Counter:
    """Adds, notes what it was given, and loses calls on demand."""

    def __init__(self) -> None:
        self._given: list[int] = []
        self._losses = 0
        self._released = threading.Event()

    def lose(self, times: int) -> tuple[None, None]:
        self._losses = times
        return None, None

    def add(self, *numbers: int) -> tuple[None, int]:
        self._given.append(sum(numbers))
        if self._losses:
            self._losses -= 1
            raise exceptions.ActorUnavailableError("lost", None)
        return None, sum(numbers)

    def fail(self) -> tuple[None, int]:
        raise KeyError("mine")

    def hold(self) -> tuple[None, None]:
        """Keep later calls from starting, until released."""
        assert self._released.wait(60.0)
        self._released.clear()
        return None, None

    def release(self) -> None:
        self._released.set()

    def given(self) -> list[int]:
        return self._given


@pytest.fixture(scope="module")
def actor(driver: None) -> Any:
    options: dict[str, Any] = {
        "num_cpus": 0,
        "concurrency_groups": {PING_GROUP: 1},
        "allow_out_of_order_execution": True,
    }
    return ray.remote(**options)(Counter).remote()


class PendingOnActor:
    """Pending calls of one actor."""

    def __init__(self, actor: Any) -> None:
        self.calls = PendingCalls()
        self._actor = actor

    def submit(self, method: str, *args: Any) -> Call[Any]:
        actor_method = getattr(self._actor, method).options(num_returns=2)
        return self.calls.submit(Call(worker=0, method=actor_method, args=args))

    def end(self, *wanted: Call[Any]) -> list[str]:
        while any(call.state == "submitted" for call in wanted):
            self.calls.wait(wanted, 1.0)
        return [call.state for call in wanted]

    def given(self) -> list[int]:
        return list(ask_all([self._actor], "given")[0])

    def release(self) -> None:
        ask_all([self._actor], "release")


@pytest.fixture
def pending(actor: Any) -> Iterator[PendingOnActor]:
    one = PendingOnActor(actor)
    before = len(one.given())
    given, one.given = one.given, lambda: given()[before:]  # type: ignore[method-assign]
    yield one
    one.calls.cancel_all()


def test_a_lost_call_is_repeated_with_those_that_depend_on_it(pending: PendingOnActor) -> None:
    first = pending.submit("add", 1, 2)
    assert pending.end(first) == ["answered"]
    assert pending.end(pending.submit("lose", 1)) == ["answered"]
    lost = pending.submit("add", first, 10)
    dependent = pending.submit("add", lost, 100)
    assert pending.end(lost, dependent) == ["lost", "lost"]
    # Only now: calls may overtake each other, and the next to arrive is lost.
    apart = pending.submit("add", 5)
    assert pending.end(apart) == ["answered"]
    assert pending.calls.in_state("lost") == [lost, dependent]
    pending.calls.repeat([lost])
    assert pending.end(lost, dependent) == ["answered", "answered"]
    assert [result_of(call.result) for call in (first, lost, dependent, apart)] == [3, 13, 113, 5]
    assert sorted(pending.given()) == [3, 5, 13, 13, 113]
    assert pending.calls.in_state("lost") == []


def test_an_answered_call_holds_no_arguments(pending: PendingOnActor) -> None:
    first = pending.submit("add", 1)
    second = pending.submit("add", first)
    assert pending.end(first, second) == ["answered", "answered"]
    assert second.args == ()


def test_an_error_is_an_answer_and_reaches_dependent_calls(
    pending: PendingOnActor,
) -> None:
    failed = pending.submit("fail")
    dependent = pending.submit("add", failed, 1)
    assert pending.end(failed, dependent) == ["answered", "answered"]
    for call in (failed, dependent):
        with pytest.raises(KeyError, match="mine"):
            result_of(call.result)
    assert pending.given() == []


@pytest.mark.parametrize("end", ["repeated", "cancelled"])
def test_a_call_that_has_not_started_does_not_run_twice(end: str, pending: PendingOnActor) -> None:
    pending.submit("hold")
    waiting = pending.submit("add", 7)
    dependent = pending.submit("add", waiting, 1)
    # What the actor was not told yet cannot be taken back from it.
    assert not pending.calls.wait([dependent], 1.0)
    if end == "repeated":
        pending.calls.repeat([waiting])
    else:
        pending.calls.cancel_all()
    # Nor at once.
    time.sleep(1.0)
    pending.release()
    if end == "repeated":
        assert pending.end(dependent) == ["answered"]
    assert pending.end(pending.submit("add", 0)) == ["answered"]
    assert sorted(pending.given()) == ([0, 7, 8] if end == "repeated" else [0])


def test_an_actor_that_is_gone_does_not_answer(actor: Any) -> None:
    other: Any = ray.remote(num_cpus=0, concurrency_groups={PING_GROUP: 1})(Counter).remote()
    assert set(ask_all([actor, other], "given")) == {0, 1}
    ray.kill(other)

    def ask_until_it_is_gone() -> None:
        for _ in range(600):  # Ray kills it some time after it was told to
            result_of(other.given.remote())
            time.sleep(0.05)

    with pytest.raises(LostCallError, match="ActorDiedError"):
        ask_until_it_is_gone()
    assert set(ask_all([actor, other], "given")) == {0}


class Waiting:
    """A worker whose calls end only when others, which must not wait for them, have begun."""

    def __init__(self) -> None:
        self._begun: defaultdict[str, threading.Event] = defaultdict(threading.Event)
        self.ended: list[str] = []

    def _call(self, name: str, *awaited: str) -> list[str]:
        self._begun[name].set()
        for other in awaited:
            assert self._begun[other].wait(60.0), f"{name} waits for {other}"
        self.ended.append(name)
        return list(self.ended)

    def read(self, part: int) -> Any:
        return self._call("read", "commit", "solve")

    def commit(self, part: int, *given: Any) -> Any:
        return self._call("commit", "read", "capture", "solve")

    def settle(self) -> Any:
        return self._call("settle")

    def capture(self, *given: Any, **named: Any) -> Any:
        return self._call("capture", "commit")

    def solve(self, *given: Any) -> Any:
        return self._call("solve", "read")


def _waiting_worker() -> Callable[[], object]:
    return Waiting


@pytest.mark.usefixtures("driver")
def test_a_worker_reads_and_commits_while_it_computes() -> None:
    executor = RayExecutor(Allocation(workers=1, threads=1), _waiting_worker)
    submit: Any = executor.submit
    try:
        calls = [
            submit(0, WorkerApi.commit, 1, "", {}),
            submit(0, WorkerApi.read, 3),
            submit(0, WorkerApi.capture, 1, 0, range(1), {}),
            submit(0, WorkerApi.solve, 2, [], {}, None),
        ]
        executor.fetch(calls[1:2])  # only now has the commit begun for certain
        settled, *_ = executor.fetch([submit(0, WorkerApi.settle), *calls])
        assert settled[-1] == "settle"
        assert "commit" in settled
        work = executor.take_work()
        assert {span.stage for span in work} == {"commit", "settle", "read", "capture", "solve"}
        assert {span.worker for span in work} == {0}
    finally:
        for actor in executor._actors:
            ray.kill(actor)


@pytest.mark.usefixtures("driver")
def test_who_watches_sees_the_same_numbers_after_a_worker_is_lost_for_good() -> None:
    executor = RayExecutor(Allocation(workers=2, threads=1), _waiting_worker)
    try:
        assert executor.doing().keys() <= {0, 1}
        executor._actors = executor._all[1:]  # as after `recover`
        executor.fetch([executor.submit(0, WorkerApi.settle)])
        assert executor.doing().keys() == {1}
    finally:
        for actor in executor._all:
            ray.kill(actor)
