"""Where a run's work is done, as the driver sees it: workers by number, handles to their results.

`pipeline.executor.ray_executor` is the real one, on Ray; `LocalExecutor` does the same in this
process, for tests of everything that is not Ray.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from pipeline.errors import PipelineError


class WorkerLostError(Exception):
    """A worker, or something that it held, is gone; what it did can be done again."""


class ExecutorError(PipelineError):
    """Work cannot be carried out here; the message says what is missing."""

    exit_code = 3


class Executor(Protocol):
    """Workers 0 … num_workers - 1, each a `pipeline.worker.worker.Worker`.

    How many there are may change in `revive`, and then only.
    """

    num_workers: int

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function of a module where workers are; the driver imports no JAX.

        Raises:
            ExecutorError: the process is lost again and again.
            Exception: what the function raised.
        """
        ...

    def submit(self, worker: int, method: str, *args: Any) -> Any:
        """Ask a worker for something; returns a handle to its result.

        Handles among `args` are replaced by what they stand for.
        """
        ...

    def fetch(self, handles: Sequence[Any]) -> list[Any]:
        """Wait for results.

        Raises:
            WorkerLostError: a worker died on the way.
            Exception: what the worker raised.
        """
        ...

    def seconds(self) -> dict[str, float]:
        """Seconds of work by method since the last call, all workers together."""
        ...

    def revive(self) -> Sequence[str]:
        """Wait until workers answer again; returns what changed about them, in words."""
        ...


class TimedWorker:
    """Calls a worker's methods by name and adds up how long they take."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._seconds: Counter[str] = Counter()

    def call(self, method: str, *args: Any) -> Any:
        start = time.perf_counter()
        try:
            return getattr(self._worker, method)(*args)
        finally:
            self._seconds[method] += time.perf_counter() - start  # type: ignore[assignment]

    def take_seconds(self) -> dict[str, float]:
        taken, self._seconds = self._seconds, Counter()
        return dict(taken)


class LocalExecutor:
    """Workers in this process, that do at once what they are asked."""

    def __init__(self, workers: Sequence[Any]) -> None:
        self.num_workers = len(workers)
        self._workers = [TimedWorker(worker) for worker in workers]

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    def submit(self, worker: int, method: str, *args: Any) -> Any:
        return self._workers[worker].call(method, *args)

    def fetch(self, handles: Sequence[Any]) -> list[Any]:
        return list(handles)

    def seconds(self) -> dict[str, float]:
        total: Counter[str] = Counter()
        for worker in self._workers:
            total.update(worker.take_seconds())
        return dict(total)

    def revive(self) -> Sequence[str]:
        return ()
