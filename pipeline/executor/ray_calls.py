"""Calls of workers, remembered until they are answered, so that lost ones can be asked again.

Ray loses a call when a message fails on its way there or back. Of most it says so, and then the
calls that were to be given the result fail too. Of others nobody ever hears: where large arguments
lie ready, a worker is told so just once. A worker's methods may be run twice without harm, so that
what was lost is simply asked again, and with it what depends on it; nothing else is done twice.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import exceptions

from pipeline.executor.protocol import ExecutorError, WorkerLostError

# What a repetition, perhaps by other or restarted processes, can mend.
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
"""How long a result that is there may take to come here."""


class LostCallError(WorkerLostError):
    """Ray did not carry a call out, or did not bring its result."""


@dataclass(eq=False, kw_only=True)
class Call:
    """Something asked of an actor; it stands for the result.

    Attributes:
        place: the actor's number.
        method: of the actor's handle; it gives two things, None and the result.
        args: calls among them stand for their results. Empty once it is answered, so that what
            nobody else needs can go.
        receipt, result: Ray's handles to the None, which is small, and to the result.
        state: "asked", "lost" or "answered", by a result or an error of its own.
    """

    place: int
    method: Any
    args: tuple[Any, ...]
    receipt: Any = None
    result: Any = None
    state: str = "new"

    def ask(self) -> None:
        self.cancel()
        args = [arg.result if isinstance(arg, Call) else arg for arg in self.args]
        self.receipt, self.result = self.method.remote(*args)
        self.state = "asked"

    def cancel(self) -> None:
        """Whoever has not begun with it leaves it."""
        if self.state == "asked":
            ray.cancel(self.receipt)

    def note(self) -> None:
        """Take down how it ended."""
        _, error = _outcome(self.receipt)
        if isinstance(error, LostCallError):
            self.state = "lost"
        else:
            self.state, self.args = "answered", ()

    def needs_any(self, others: Iterable[Call]) -> bool:
        return any(arg in others for arg in self.args if isinstance(arg, Call))


class OpenCalls:
    """Those that are not answered yet, in an order in which none needs a later one."""

    def __init__(self) -> None:
        self._open: list[Call] = []

    def ask(self, place: int, method: Any, args: tuple[Any, ...]) -> Call:
        call = Call(place=place, method=method, args=args)
        call.ask()
        self._open.append(call)
        return call

    def wait(self, wanted: Sequence[Call], seconds: float) -> bool:
        """Wait until all that is wanted has ended somehow, but not for longer.

        Returns:
            whether any open call was answered.
        """
        receipts = list(dict.fromkeys(call.receipt for call in wanted if call.state == "asked"))
        if receipts:
            ray.wait(receipts, num_returns=len(receipts), timeout=seconds, fetch_local=False)
        asked = {call.receipt: call for call in self.in_state("asked")}
        if asked:
            ended, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0, fetch_local=False)
            for receipt in ended:
                asked[receipt].note()
        before = len(self._open)
        self._open = [call for call in self._open if call.state != "answered"]
        return len(self._open) < before

    def in_state(self, state: str) -> list[Call]:
        return [call for call in self._open if call.state == state]

    def repeat(self, calls: Sequence[Call]) -> None:
        """Ask again, and also what was to be given the results."""
        again: set[Call] = set()
        for call in self._open:
            if call in calls or call.needs_any(again):
                call.ask()
                again.add(call)

    def give_up(self) -> None:
        """Want none of them any more."""
        for call in self._open:
            call.cancel()
        self._open.clear()


def result_of(handle: Any) -> Any:
    """What a handle of Ray stands for.

    Raises:
        LostCallError: Ray lost it.
        ExecutorError: Ray fails in another way.
        Exception: what was raised where the call was carried out.
    """
    result, error = _outcome(handle)
    if error is not None:
        raise error
    return result


def answers_of(actors: Sequence[Any], question: str, *, copies: int = 1) -> dict[int, Any]:
    """The answers of those that give one now, whatever else they do, by their place.

    Args:
        copies: of the question to each, side by side, where a lost one must not be taken for
            nobody there.
    """
    end = time.monotonic() + _ANSWER_SECONDS
    asked = {
        getattr(actor, question).options(concurrency_group="roll_call").remote(): place
        for place, actor in enumerate(actors)
        for _ in range(copies)
    }
    answers: dict[int, Any] = {}
    while asked and len(answers) < len(actors):
        ended, _ = ray.wait(list(asked), timeout=max(end - time.monotonic(), 0.0))
        if not ended:
            break
        place = asked.pop(ended[0])
        answer, error = _outcome(ended[0])
        if error is None:
            answers[place] = answer
        elif not isinstance(error, LostCallError):
            raise error
    return answers


def _outcome(handle: Any) -> tuple[Any, Exception | None]:
    """What a handle stands for, or else why not."""
    try:
        return ray.get(handle, timeout=_RESULT_SECONDS), None
    except exceptions.RayTaskError as error:
        cause: Exception = error
        # An argument's error is in that of the call that was to be given it.
        while isinstance(cause, exceptions.RayTaskError):
            cause = cause.cause
        return None, LostCallError(type(cause).__name__) if isinstance(cause, _LOST) else cause
    except _LOST as error:
        if isinstance(error, exceptions.RayActorError) and error.actor_init_failed:
            return None, _not_started(error)
        return None, LostCallError(type(error).__name__)
    except exceptions.RayError as error:
        reason = " ".join(str(error).split())[:300]
        text = f"the Ray cluster failed ({type(error).__name__}: {reason}); check it, then resume"
        return None, ExecutorError(text)


def _not_started(error: exceptions.RayActorError) -> ExecutorError:
    """Of an actor whose constructor failed: Ray does not start it again."""
    reason = str(error).strip().splitlines()[-1].strip()[:300]
    return ExecutorError(
        f"a worker cannot start ({reason}); check that quantfleet is installed alike on all nodes "
        "of the cluster, then resume"
    )
