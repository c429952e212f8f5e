"""An executor without Ray, for tests of everything that is not Ray."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, cast

from pipeline.executor.protocol import Handle, P, T
from pipeline.executor.work_spans import Doing, TimedWorker, WorkSpan


@dataclass(frozen=True)
class _Done(Handle[T]):
    result: T


class LocalExecutor:
    """Workers in this process; a call is done as soon as it is submitted."""

    def __init__(self, workers: Sequence[object]) -> None:
        self.num_workers = len(workers)
        self._workers = [TimedWorker(worker) for worker in workers]

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return function(*args, **kwargs)

    @property
    def num_processes(self) -> int:
        return max(1, self.num_workers)

    def run_each(self, function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> list[T]:
        return [function(*args) for args in arguments]

    def work_on(self, run_url: str) -> None:
        raise AssertionError("workers of another run have an executor of their own")

    def submit(
        self,
        worker: int,
        method: Callable[Concatenate[Any, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Handle[T]:
        results = [arg.result if isinstance(arg, _Done) else arg for arg in args]
        return _Done(self._workers[worker].call(method.__name__, *results, **kwargs))

    def fetch(self, handles: Sequence[Handle[T]]) -> list[T]:
        return [cast(_Done[T], handle).result for handle in handles]

    def take_work(self) -> list[WorkSpan]:
        return [
            dataclasses.replace(span, worker=number)
            for number, worker in enumerate(self._workers)
            for span in worker.take_work()
        ]

    def doing(self) -> Mapping[int, Doing]:
        return {number: worker.doing() for number, worker in enumerate(self._workers)}

    def recover(self) -> Sequence[str]:
        return ()
