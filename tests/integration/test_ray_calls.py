"""Lost calls are asked again, with what depends on them and nothing else, on a real cluster."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray import exceptions

from pipeline.executor.ray_calls import Call, LostCallError, OpenCalls, answers_of, result_of


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
        """Keep what was asked later from beginning, until released."""
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
        "concurrency_groups": {"roll_call": 1},
        "allow_out_of_order_execution": True,
    }
    return ray.remote(**options)(Counter).remote()


class Asking:
    """Open calls of one actor."""

    def __init__(self, actor: Any) -> None:
        self.calls = OpenCalls()
        self._actor = actor

    def ask(self, method: str, *args: Any) -> Call:
        return self.calls.ask(0, getattr(self._actor, method).options(num_returns=2), args)

    def end(self, *wanted: Call) -> list[str]:
        while any(call.state == "asked" for call in wanted):
            self.calls.wait(wanted, 1.0)
        return [call.state for call in wanted]

    def given(self) -> list[int]:
        return list(answers_of([self._actor], "given")[0])

    def release(self) -> None:
        answers_of([self._actor], "release")


@pytest.fixture
def asking(actor: Any) -> Iterator[Asking]:
    one = Asking(actor)
    before = len(one.given())
    given, one.given = one.given, lambda: given()[before:]  # type: ignore[method-assign]
    yield one
    one.calls.give_up()


def test_a_lost_call_is_asked_again_with_those_that_need_it(asking: Asking) -> None:
    first = asking.ask("add", 1, 2)
    assert asking.end(first) == ["answered"]
    assert asking.end(asking.ask("lose", 1)) == ["answered"]
    lost = asking.ask("add", first, 10)
    needing = asking.ask("add", lost, 100)
    apart = asking.ask("add", 5)
    assert asking.end(lost, needing, apart) == ["lost", "lost", "answered"]
    assert asking.calls.in_state("lost") == [lost, needing]
    asking.calls.repeat([lost])
    assert asking.end(lost, needing) == ["answered", "answered"]
    assert [result_of(call.result) for call in (first, lost, needing, apart)] == [3, 13, 113, 5]
    assert sorted(asking.given()) == [3, 5, 13, 13, 113]
    assert asking.calls.in_state("lost") == []


def test_an_answered_call_holds_nothing_that_it_was_given(asking: Asking) -> None:
    first = asking.ask("add", 1)
    second = asking.ask("add", first)
    assert asking.end(first, second) == ["answered", "answered"]
    assert second.args == ()


def test_an_error_is_an_answer_and_reaches_who_needs_the_result(asking: Asking) -> None:
    failed = asking.ask("fail")
    needing = asking.ask("add", failed, 1)
    assert asking.end(failed, needing) == ["answered", "answered"]
    for call in (failed, needing):
        with pytest.raises(KeyError, match="mine"):
            result_of(call.result)
    assert asking.given() == []


@pytest.mark.parametrize("end", ["repeated", "given up"])
def test_what_has_not_begun_is_not_done_twice(end: str, asking: Asking) -> None:
    asking.ask("hold")
    waiting = asking.ask("add", 7)
    needing = asking.ask("add", waiting, 1)
    # What the actor was not told yet cannot be taken back from it.
    assert not asking.calls.wait([needing], 1.0)
    if end == "repeated":
        asking.calls.repeat([waiting])
    else:
        asking.calls.give_up()
    # Nor at once.
    time.sleep(1.0)
    asking.release()
    if end == "repeated":
        assert asking.end(needing) == ["answered"]
    assert asking.end(asking.ask("add", 0)) == ["answered"]
    assert sorted(asking.given()) == ([0, 7, 8] if end == "repeated" else [0])


def test_who_is_gone_does_not_answer(actor: Any) -> None:
    other: Any = ray.remote(num_cpus=0, concurrency_groups={"roll_call": 1})(Counter).remote()
    assert set(answers_of([actor, other], "given")) == {0, 1}
    ray.kill(other)
    assert set(answers_of([actor, other], "given")) == {0}
    with pytest.raises(LostCallError, match="ActorDiedError"):
        result_of(other.given.remote())
