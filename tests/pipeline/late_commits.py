"""An executor whose commits take as long as they may: until their records are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pipeline.executor.protocol import Handle, WorkerLostError
from pipeline.run.worker_api import WorkerApi
from pipeline.worker.worker import Worker
from tests.pipeline.tiny_runs import CountingExecutor


class _Late(Handle[Any]):
    """The handle of a commit that has not been carried out."""

    def __init__(self, carry_out: Callable[[], Handle[Any]]) -> None:
        self._carry_out: Callable[[], Handle[Any]] | None = carry_out
        self._done: Handle[Any] | Exception = WorkerLostError("killed with its commit")

    def end(self) -> None:
        """Carry the commit out, unless that was done."""
        carry_out, self._carry_out = self._carry_out, None
        if carry_out is not None:
            try:
                self._done = carry_out()
            except Exception as error:  # noqa: BLE001 - raised where the record is fetched
                self._done = error

    def handle(self) -> Handle[Any]:
        self.end()
        if isinstance(self._done, Exception):
            raise self._done
        return self._done

    def lose(self) -> None:
        self._carry_out = None


class LateCommits(CountingExecutor):
    """Carries a commit out when its record is fetched, or when its worker is to settle.

    Attributes:
        submitted: (method, first argument) in order; `done` has the order in which they ran.
    """

    def __init__(
        self,
        make_worker: Callable[[], Worker],
        num_workers: int,
        *,
        lose: Sequence[tuple[str, int]] = (),
    ) -> None:
        super().__init__(make_worker, num_workers, lose=lose)
        self._late: dict[int, list[_Late]] = {}
        self.submitted: list[tuple[str, Any]] = []

    def submit(
        self, worker: int, method: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Handle[Any]:
        self.submitted.append((method.__name__, args[0] if args else None))
        if method is WorkerApi.settle:
            for late in self._late.pop(worker, []):
                late.end()
        submit = super().submit
        if method not in (WorkerApi.commit, WorkerApi.commit_sums):
            return submit(worker, method, *args, **kwargs)
        late = _Late(lambda: submit(worker, method, *args, **kwargs))
        self._late.setdefault(worker, []).append(late)
        return late

    def fetch(self, handles: Sequence[Handle[Any]]) -> list[Any]:
        return super().fetch([h.handle() if isinstance(h, _Late) else h for h in handles])

    def restart(self, worker: int) -> None:
        super().restart(worker)
        for late in self._late.pop(worker, []):
            late.lose()
