"""Workers as Ray actors, each a process of its own that Ray restarts as often as it dies."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, cast, get_args

import ray

from pipeline.executor.protocol import (
    Allocation,
    ConcurrencyGroup,
    ExecutorError,
    Handle,
    P,
    T,
    WorkerLostError,
    group_of,
)
from pipeline.executor.ray_calls import PING_GROUP, Call, PendingCalls, ask_all, result_of
from pipeline.executor.ray_cluster import GcsMonitor
from pipeline.executor.work_spans import Doing, TimedWorker, WorkSpan
from pipeline.executor.worker_environment import worker_environment

_MOST_RUNS = 4
_WAIT_SECONDS = 1.0
_PING_SECONDS = 5.0
_WATCHING_SECONDS = 1.0
_PING_COPIES = 4
"""At 15% of messages lost, all four are lost one time in two thousand."""
_MOST_LOST_ROUNDS = 8
"""Of repeating what was lost, with nothing answered between them."""
# Large arguments travel while no worker is busy; repeating a call then is needless but harmless.
_IDLE_SECONDS = 10.0
_MOST_IDLE_REPEATS = 3
# A silent worker may be starting, or may be inside a library that holds the interpreter's lock.
_SILENT_SECONDS = 120.0
_RECOVERY_SECONDS = 600.0
"""How long all workers may be away before a run ends."""
_STUCK_SECONDS = 30.0
_REPLACEMENT_SECONDS = 60.0
"""How long the missing workers are waited for, once others have answered."""


class RayExecutor:
    """Worker actors on the connected cluster."""

    def __init__(
        self, allocation: Allocation, start_worker: Callable[[], Callable[..., object]]
    ) -> None:
        """Start the actors; returns before they are up.

        Args:
            start_worker: called in each process when it starts, to import what takes long. It
                returns a function that opens the worker at the first call of one of its methods:
                what fails there reaches the driver, as a failing actor's end does not, and what
                the worker reads need not exist before. After `work_on` it is given the run's URL.
        """
        self._run_url = ""
        self.num_workers = allocation.workers
        options: dict[str, Any] = {
            "num_cpus": allocation.threads,
            "num_gpus": allocation.gpus,
            "accelerator_type": allocation.accelerator or None,
            "max_restarts": -1,
            # Lost calls are repeated here: Ray's own repetitions outlive a worker's death, whose
            # shards must be restored first, and it prints them on standard output.
            "max_task_retries": 0,
            # A lost call holds up no other; a call that must come later is given its result.
            "allow_out_of_order_execution": True,
            # While a block is solved, the next one is read and the one before it committed.
            "concurrency_groups": dict.fromkeys([*get_args(ConcurrencyGroup), PING_GROUP], 1),
            "runtime_env": {"env_vars": worker_environment(allocation)},
        }
        actor: Any = ray.remote(**options)(_WorkerActor)
        here = str(Path.cwd())
        self._all: list[Any] = [actor.remote(start_worker, here) for _ in range(allocation.workers)]
        self._actors = list(self._all)
        self._calls = PendingCalls()
        self._gcs = GcsMonitor()
        self._incarnations: dict[int, str] = {}

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a module's function in the first worker's process."""
        result: T = self._run_each([((function, *args), kwargs)])[0]
        return result

    @property
    def num_processes(self) -> int:
        return self.num_workers

    def run_each(self, function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> list[T]:
        """Call a module's function in the workers' processes, turn by turn."""
        return self._run_each([((function, *args), {}) for args in arguments])

    def _run_each(self, calls: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]) -> list[Any]:
        for _ in range(_MOST_RUNS):
            submitted: list[Call[Any]] = []
            for i, (args, kwargs) in enumerate(calls):
                worker = i % len(self._actors)
                method = self._actors[worker].run.options(num_returns=2)
                of_run = {**kwargs, "of_run": self._run_url}
                call: Call[Any] = Call(worker=worker, method=method, args=args, kwargs=of_run)
                submitted.append(self._calls.submit(call))
            try:
                return self.fetch(submitted)
            except WorkerLostError as error:
                last = error
                self.recover()
        raise ExecutorError(
            f"a worker that prepares the run was lost {_MOST_RUNS} times ({last}); check the "
            "memory of the cluster's nodes, then try again"
        )

    def work_on(self, run_url: str) -> None:
        # Each call says which run it is of, since a process may restart at any time.
        self._run_url = run_url

    def submit(
        self,
        worker: int,
        method: Callable[Concatenate[Any, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Handle[T]:
        actor_method = self._actors[worker].call.options(
            num_returns=2, concurrency_group=group_of(method)
        )
        return self._calls.submit(
            Call(
                worker=worker,
                method=actor_method,
                args=(self._run_url, method.__name__, *args),
                kwargs=kwargs,
            )
        )

    def fetch(self, handles: Sequence[Handle[T]]) -> list[T]:
        """Wait as long as any worker is busy, and repeat calls that were lost."""
        calls = cast(Sequence[Call[T]], handles)
        try:
            self._await(calls)
            return [result_of(call.result) for call in calls]
        except Exception:
            self._calls.cancel_all()
            raise

    def _await(self, wanted: Sequence[Call[Any]]) -> None:
        lost_rounds = idle_repeats = 0
        last_sign_of_work = last_ping = time.monotonic()
        while True:
            # Also while answers come quickly: Ray ends this process once the head is away too long.
            self._gcs.check()
            any_answered = self._calls.wait(wanted, _WAIT_SECONDS)
            if all(call.state == "answered" for call in wanted):
                return
            if any_answered:
                lost_rounds = idle_repeats = 0
            lost = self._calls.in_state("lost")
            if lost:
                lost_rounds += 1
                if lost_rounds > _MOST_LOST_ROUNDS:
                    raise WorkerLostError(f"calls are lost {_MOST_LOST_ROUNDS} times in a row")
                self._check_incarnations({call.worker for call in lost})
                self._calls.repeat(lost)
            if any_answered or lost:
                last_sign_of_work = last_ping = time.monotonic()
            elif time.monotonic() - last_ping > _PING_SECONDS:
                answers = _ping(self._actors)
                last_ping = time.monotonic()
                if any(is_busy for _, is_busy in answers.values()):
                    last_sign_of_work = last_ping
                all_idle = len(answers) == len(self._actors)
                limit = _IDLE_SECONDS * 2**idle_repeats if all_idle else _SILENT_SECONDS
                if last_ping - last_sign_of_work > limit:
                    idle_repeats += 1
                    if idle_repeats > _MOST_IDLE_REPEATS:
                        raise WorkerLostError("no worker is busy, and no result arrives")
                    self._check_incarnations(range(len(self._actors)))
                    self._calls.repeat(self._calls.in_state("submitted"))
                    last_sign_of_work = last_ping

    def _check_incarnations(self, workers: Iterable[int]) -> None:
        """Raise WorkerLostError if one has restarted since its last check, or does not answer."""
        workers = sorted(workers)
        answers = _ping([self._actors[worker] for worker in workers])
        for i, worker in enumerate(workers):
            if i not in answers:
                raise WorkerLostError(f"worker {worker} does not answer")
            incarnation, _ = answers[i]
            if self._incarnations.setdefault(worker, incarnation) != incarnation:
                raise WorkerLostError(f"worker {worker} has restarted")

    def take_work(self) -> list[WorkSpan]:
        found: list[WorkSpan] = []
        for worker, (incarnation, spans) in ask_all(self._actors, "take_work").items():
            self._incarnations.setdefault(worker, incarnation)
            number = self._all.index(self._actors[worker])
            found += (dataclasses.replace(span, worker=number) for span in spans)
        return found

    def doing(self) -> Mapping[int, Doing]:
        # Whoever watches must not be kept, and a message may be lost: the next answer comes soon.
        actors = self._actors  # which another thread may replace
        answers = ask_all(actors, "doing", seconds=_WATCHING_SECONDS)
        return {self._all.index(actors[i]): answer for i, answer in answers.items()}

    def recover(self) -> Sequence[str]:
        """Wait for all workers, or else go on with those whose nodes are still there.

        A missing worker may still come back: the next recovery looks for it again. A worker that
        is there but does not answer is restarted.
        """
        before = self.num_workers
        start = time.monotonic()
        pause = 0.2
        restarted_stuck = False
        while True:
            present = _ping(self._all)
            elapsed = time.monotonic() - start
            if len(present) == len(self._all) or (present and elapsed > _REPLACEMENT_SECONDS):
                break
            if elapsed > _RECOVERY_SECONDS:
                raise ExecutorError(
                    f"no worker came back within {_RECOVERY_SECONDS:g} s; check the cluster's "
                    "nodes, then resume"
                )
            if elapsed > _STUCK_SECONDS and not restarted_stuck:
                restarted_stuck = True
                for worker, actor in enumerate(self._all):
                    if worker not in present:
                        ray.kill(actor, no_restart=False)
            time.sleep(pause)
            pause = min(2 * pause, 5.0)
        self._actors = [self._all[worker] for worker in sorted(present)]
        self._incarnations = {i: present[worker][0] for i, worker in enumerate(sorted(present))}
        self.num_workers = len(self._actors)
        if self.num_workers == before:
            return ()
        return (f"goes on with {self.num_workers} of {len(self._all)} workers",)


def _ping(actors: Sequence[Any]) -> dict[int, tuple[str, bool]]:
    """Of each actor that answers: its incarnation, and whether it is busy."""
    return ask_all(actors, "ping", copies=_PING_COPIES)


class _WorkerActor:
    """The process of one worker."""

    def __init__(self, start_worker: Callable[[], Callable[..., object]], folder: str) -> None:
        # Relative paths of texts start where the user is. On a machine without that folder they
        # must not be found elsewhere by chance: then they are reported as missing.
        os.chdir(folder if Path(folder).is_dir() else "/")
        self._open_worker = start_worker()
        self._timed: TimedWorker | None = None
        self._run_url = ""
        # Of a call and the concurrent ones beside it.
        self._lock = threading.Lock()
        self._num_calls = 0
        self._incarnation = secrets.token_hex(8)

    def call(self, run_url: str, method: str, *args: Any, **kwargs: Any) -> tuple[None, Any]:
        with self._busy():
            return None, self._worker(run_url).call(method, *args, **kwargs)

    def run(
        self, function: Callable[..., Any], *args: Any, of_run: str = "", **kwargs: Any
    ) -> tuple[None, Any]:
        """Call a function; what is held for another run than that of this URL is freed first."""
        with self._busy():
            if of_run:
                self._free_for(of_run)
            return None, function(*args, **kwargs)

    def ping(self) -> tuple[str, bool]:
        """A token that differs after every restart, and whether a call is running."""
        return self._incarnation, self._num_calls > 0

    @contextlib.contextmanager
    def _busy(self) -> Iterator[None]:
        with self._lock:
            self._num_calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_calls -= 1

    def take_work(self) -> tuple[str, list[WorkSpan]]:
        """The token of `ping`, and what was done since the last call."""
        return self._incarnation, [] if self._timed is None else self._timed.take_work()

    def doing(self) -> Doing:
        return Doing() if self._timed is None else self._timed.doing()

    def _free_for(self, run_url: str) -> None:
        with self._lock:
            if self._timed is not None and run_url != self._run_url:
                self._timed = None
                gc.collect()  # models refer to themselves in cycles

    def _worker(self, run_url: str) -> TimedWorker:
        self._free_for(run_url)
        with self._lock:
            if self._timed is None:
                given = [run_url] if run_url else []
                self._timed, self._run_url = TimedWorker(self._open_worker(*given)), run_url
            return self._timed
