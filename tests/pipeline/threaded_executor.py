"""An executor without Ray whose workers read and commit beside what they compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from pipeline.executor.protocol import Handle, group_of
from pipeline.worker.worker import Worker
from tests.pipeline.tiny_runs import CountingExecutor


class _Running(Handle[Any]):
    def __init__(self, future: Future[Any]) -> None:
        self.future = future


class ThreadedExecutor(CountingExecutor):
    """Runs the calls of each worker's groups in threads of their own, and all others in one.

    That one thread serves all workers, which share compiled programs here (see `QuickWorker`).
    """

    def __init__(
        self,
        make_worker: Callable[[], Worker],
        num_workers: int,
        *,
        lose: Sequence[tuple[str, int]] = (),
    ) -> None:
        assert not lose, "workers do not die here"
        super().__init__(make_worker, num_workers)
        self._threads: dict[tuple[int, str], ThreadPoolExecutor] = {}

    def submit(
        self, worker: int, method: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Handle[Any]:
        self.calls[method.__name__] += 1
        group = group_of(method)
        key = (-1, "") if group is None else (worker, group)
        if key not in self._threads:
            self._threads[key] = ThreadPoolExecutor(1)

        def call() -> Any:
            # What these wait for was submitted before, so that it will come.
            results = [a.future.result() if isinstance(a, _Running) else a for a in args]
            self.done.append((method.__name__, args[0] if args else None))
            return self._workers[worker].call(method.__name__, *results, **kwargs)

        return _Running(self._threads[key].submit(call))

    def fetch(self, handles: Sequence[Handle[Any]]) -> list[Any]:
        return [handle.future.result() for handle in handles if isinstance(handle, _Running)]
