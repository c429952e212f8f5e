"""An executor that carries each call out as late as it may: when its result is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pipeline.executor.protocol import Handle
from tests.pipeline.tiny_runs import CountingExecutor


class _Call(Handle[Any]):
    def __init__(self, carry_out: Callable[[], Handle[Any]]) -> None:
        self._carry_out = carry_out
        self._done: Handle[Any] | None = None

    def handle(self) -> Handle[Any]:
        if self._done is None:
            self._done = self._carry_out()
        return self._done


class LazyCalls(CountingExecutor):
    """Calls come in no order but that of what they are given, as Ray may carry them out."""

    def submit(
        self, worker: int, method: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Handle[Any]:
        submit = super().submit

        def carry_out() -> Handle[Any]:
            given = [arg.handle() if isinstance(arg, _Call) else arg for arg in args]
            return submit(worker, method, *given, **kwargs)

        return _Call(carry_out)

    def fetch(self, handles: Sequence[Handle[Any]]) -> list[Any]:
        # The last first: their order is not promised either.
        done = [h.handle() if isinstance(h, _Call) else h for h in reversed(handles)]
        return super().fetch(done[::-1])
