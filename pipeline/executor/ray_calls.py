"""Calls of workers, remembered until they are answered, so that lost ones can be repeated.

Ray loses a call when a message fails on its way there or back. It reports most of these, and then
the calls that depend on the result fail too. Others it never reports: where large arguments are
ready, a worker is told of a call only once. A worker's methods may run twice without harm, so a
lost call is simply repeated, and with it what depends on it; nothing else runs twice.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray import exceptions

from pipeline.executor.protocol import ExecutorError, Handle, T, WorkerLostError

# What repeating, perhaps on other or restarted processes, can mend.
_LOST = (
    exceptions.ActorDiedError,
    exceptions.ActorUnavailableError,
    exceptions.GetTimeoutError,
    exceptions.WorkerCrashedError,
    exceptions.NodeDiedError,
    exceptions.ObjectLostError,
    exceptions.OwnerDiedError,
    exceptions.OutOfMemoryError,
    exceptions.RaySystemError,
)
_ANSWER_SECONDS = 10.0
_RESULT_SECONDS = 600.0
"""How long a finished call's result may take to arrive."""

PING_GROUP = "ping"
"""Concurrency group of the methods that an actor answers whatever else it does."""

CallState = Literal["new", "submitted", "lost", "answered"]


class LostCallError(WorkerLostError):
    """Ray did not carry a call out, or did not deliver its result."""


@dataclass(eq=False, kw_only=True)
class Call(Handle[T]):
    """One call of an actor; it stands for the result.

    Attributes:
        worker: the actor's number.
        method: of the actor's handle; it returns two things, None and the result.
        args, kwargs: calls among the args stand for their results. Both are emptied once the call
            is answered, so that results which no other call needs are freed.
        receipt, result: Ray's handles to the None, which is small, and to the result.
    """

    worker: int
    method: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    receipt: Any = None
    result: Any = None
    state: CallState = "new"

    def submit(self) -> None:
        self.cancel()
        args = [arg.result if isinstance(arg, Call) else arg for arg in self.args]
        self.receipt, self.result = self.method.remote(*args, **self.kwargs)
        self.state = "submitted"

    def cancel(self) -> None:
        """Cancel the call if it has not started."""
        if self.state == "submitted":
            ray.cancel(self.receipt)


class PendingCalls:
    """Calls not answered yet, in an order in which none depends on a later one."""

    def __init__(self) -> None:
        self._pending: list[Call[Any]] = []

    def submit(self, call: Call[T]) -> Call[T]:
        call.submit()
        self._pending.append(call)
        return call

    def wait(self, wanted: Sequence[Call[Any]], seconds: float) -> bool:
        """Wait until all wanted calls have ended somehow, but no longer than `seconds`.

        Returns:
            whether any pending call was answered.
        """
        receipts = list(dict.fromkeys(call.receipt for call in wanted if call.state == "submitted"))
        if receipts:
            ray.wait(receipts, num_returns=len(receipts), timeout=seconds, fetch_local=False)
        submitted = {call.receipt: call for call in self.in_state("submitted")}
        if submitted:
            ended, _ = ray.wait(
                list(submitted), num_returns=len(submitted), timeout=0, fetch_local=False
            )
            for receipt in ended:
                call = submitted[receipt]
                if isinstance(_outcome(receipt)[1], LostCallError):
                    call.state = "lost"
                else:
                    call.state, call.args, call.kwargs = "answered", (), {}
        before = len(self._pending)
        self._pending = [call for call in self._pending if call.state != "answered"]
        return len(self._pending) < before

    def in_state(self, state: CallState) -> list[Call[Any]]:
        return [call for call in self._pending if call.state == state]

    def repeat(self, calls: Sequence[Call[Any]]) -> None:
        """Submit calls again, and those that depend on them."""
        repeated: set[Call[Any]] = set()
        for call in self._pending:
            depends = any(arg in repeated for arg in call.args if isinstance(arg, Call))
            if call in calls or depends:
                call.submit()
                repeated.add(call)

    def cancel_all(self) -> None:
        for call in self._pending:
            call.cancel()
        self._pending.clear()


def result_of(object_ref: Any) -> Any:
    """Fetch what a Ray object reference stands for.

    Raises:
        LostCallError: Ray lost it.
        ExecutorError: Ray fails in another way.
        Exception: what was raised where the call ran.
    """
    result, error = _outcome(object_ref)
    if error is not None:
        raise error
    return result


def ask_all(
    actors: Sequence[Any], method: str, *, copies: int = 1, seconds: float = _ANSWER_SECONDS
) -> dict[int, Any]:
    """Call a method of the ping group on all actors; the answers that arrive, by actor number.

    Args:
        copies: sent to each, side by side, so that a lost message is not taken for a lost actor.
        seconds: to wait for them.
    """
    deadline = time.monotonic() + seconds
    pending = {
        getattr(actor, method).options(concurrency_group=PING_GROUP).remote(): number
        for number, actor in enumerate(actors)
        for _ in range(copies)
    }
    answers: dict[int, Any] = {}
    while pending and len(answers) < len(actors):
        ended, _ = ray.wait(list(pending), timeout=max(deadline - time.monotonic(), 0.0))
        if not ended:
            break
        number = pending.pop(ended[0])
        answer, error = _outcome(ended[0])
        if error is None:
            answers[number] = answer
        elif not isinstance(error, LostCallError):
            raise error
    return answers


def _outcome(object_ref: Any) -> tuple[Any, Exception | None]:
    """The result that a reference stands for, or else the error."""
    try:
        return ray.get(object_ref, timeout=_RESULT_SECONDS), None
    except exceptions.RayTaskError as error:
        cause: Exception = error
        # The error of a call that an argument came from is inside that of the call it was for.
        while isinstance(cause, exceptions.RayTaskError):
            cause = cause.cause
        return None, LostCallError(type(cause).__name__) if isinstance(cause, _LOST) else cause
    except _LOST as error:
        if not (isinstance(error, exceptions.RayActorError) and error.actor_init_failed):
            return None, LostCallError(type(error).__name__)
        # Ray does not restart an actor whose constructor failed.
        reason = str(error).strip().splitlines()[-1].strip()
        _, own, told = reason.partition(f"{ExecutorError.__name__}: ")
        if own:  # which says what to do
            return None, ExecutorError(f"a worker cannot start: {told}")
        return None, ExecutorError(
            f"a worker cannot start ({reason[:300]}); check that quantfleet is installed alike on "
            "all nodes of the cluster, then resume"
        )
    except exceptions.RayError as error:
        reason = " ".join(str(error).split())[:300]
        text = f"the Ray cluster failed ({type(error).__name__}: {reason}); check it, then resume"
        return None, ExecutorError(text)
