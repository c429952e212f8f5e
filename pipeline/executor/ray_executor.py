"""The door to Ray: a executor of warm worker actors on the cluster that this process has joined."""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from pipeline.executor.protocol import ExecutorError, TimedWorker, WorkerLostError
from pipeline.executor.ray_calls import Call, OpenCalls, answers_of, result_of
from pipeline.executor.ray_cluster import Head, Resources, joined, worker_environment
from pipeline.plan import read_plan
from pipeline.storage.object_store import open_store

__all__ = ["RayExecutor", "joined"]

_IO_METHODS = frozenset({"read"})
_PATIENCE_SECONDS = 600.0
"""How long workers may all be away before a run ends."""
_MOST_RUNS = 4
_LOOK_SECONDS = 1.0
_ROLL_CALL_SECONDS = 5.0
_COPIES = 4
"""Of a question: at 15% of messages lost, all are one time in two thousand."""
_MOST_ROUNDS = 8
"""Of asking again what was lost, with nothing answered between them."""
# Large arguments travel while nobody works; then asking again is of no use, but does no harm.
_IDLE_SECONDS = 10.0
_MOST_REPEATS = 3
# Who says nothing may be starting, or may work in a library that lets nobody else speak.
_SILENT_SECONDS = 120.0
_STUCK_SECONDS = 30.0
_REPLACEMENT_SECONDS = 60.0
"""How long the last of them are waited for, once others are back."""


class RayExecutor:
    """Worker actors that Ray restarts as often as they die."""

    def __init__(self, resources: Resources, source_url: str, run_url: str) -> None:
        """Start workers; what is asked of them but `run` needs a run claimed at `run_url`."""
        self.num_workers = resources.workers
        options: dict[str, Any] = {
            "num_cpus": resources.threads,
            "num_gpus": resources.gpus,
            "max_restarts": -1,
            # Lost calls are repeated here: Ray's own repetitions outlive a worker's death, whose
            # shards must be brought back first, and it tells of them on standard output.
            "max_task_retries": 0,
            # A lost call holds up no other; what must come after it is given its result.
            "allow_out_of_order_execution": True,
            # The next block is read while this one is solved.
            "concurrency_groups": {"io": 1, "roll_call": 1},
            "runtime_env": {"env_vars": worker_environment(resources)},
        }
        actor: Any = ray.remote(**options)(_Actor)
        here = str(Path.cwd())
        self._all: list[Any] = [
            actor.remote(source_url, run_url, here) for _ in range(resources.workers)
        ]
        self._actors = list(self._all)
        self._calls = OpenCalls()
        self._head = Head()
        self._tokens: dict[int, str] = {}

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function of a module in the first worker's process, which has JAX and Keras.

        Raises:
            ExecutorError: the process is lost again and again.
            Exception: what the function raised.
        """
        for _ in range(_MOST_RUNS):
            try:
                return self.fetch([self._ask(0, "run", None, function, *args)])[0]
            except WorkerLostError as error:
                last = error
                self.revive()
        raise ExecutorError(
            f"a worker that prepares the run was lost {_MOST_RUNS} times ({last}); check the "
            "memory of the cluster's nodes, then try again"
        )

    def submit(self, worker: int, method: str, *args: Any) -> Any:
        return self._ask(worker, "call", "io" if method in _IO_METHODS else None, method, *args)

    def _ask(self, place: int, name: str, group: str | None, *args: Any) -> Call:
        options = {} if group is None else {"concurrency_group": group}
        method = getattr(self._actors[place], name).options(num_returns=2, **options)
        return self._calls.ask(place, method, args)

    def fetch(self, handles: Sequence[Any]) -> list[Any]:
        """Wait, as long as anybody works, and ask again what was lost on the way."""
        try:
            self._await(handles)
            return [result_of(call.result) for call in handles]
        except Exception:
            self._calls.give_up()
            raise

    def _await(self, wanted: Sequence[Call]) -> None:
        rounds = repeats = 0
        heard = asked = time.monotonic()
        while True:
            # Also where answers come quickly: Ray does not wait for a slow one to end this process.
            self._head.check()
            goes_on = self._calls.wait(wanted, _LOOK_SECONDS)
            if all(call.state == "answered" for call in wanted):
                return
            if goes_on:
                rounds = repeats = 0
            lost = self._calls.in_state("lost")
            if lost:
                rounds += 1
                if rounds > _MOST_ROUNDS:
                    raise WorkerLostError(f"calls are lost {_MOST_ROUNDS} times in a row")
                self._recognize(sorted({call.place for call in lost}))
                self._calls.repeat(lost)
            if goes_on or lost:
                heard = asked = time.monotonic()
            elif time.monotonic() - asked > _ROLL_CALL_SECONDS:
                answers = _roll_call(self._actors)
                asked = time.monotonic()
                if any(is_busy for _, is_busy in answers.values()):
                    heard = asked
                all_idle = len(answers) == len(self._actors)
                limit = _IDLE_SECONDS * 2**repeats if all_idle else _SILENT_SECONDS
                if asked - heard > limit:
                    repeats += 1
                    if repeats > _MOST_REPEATS:
                        raise WorkerLostError("nobody works, and nothing arrives")
                    self._recognize(range(len(self._actors)))
                    self._calls.repeat(self._calls.in_state("asked"))
                    heard = asked

    def _recognize(self, places: Iterable[int]) -> None:
        """Make sure that workers are those that they were.

        Raises:
            WorkerLostError: one was started anew, or does not answer.
        """
        places = list(places)
        answers = _roll_call([self._actors[place] for place in places])
        for number, place in enumerate(places):
            if number not in answers:
                raise WorkerLostError(f"worker {place} does not answer")
            token, _ = answers[number]
            if self._tokens.setdefault(place, token) != token:
                raise WorkerLostError(f"worker {place} was started anew")

    def seconds(self) -> dict[str, float]:
        total: Counter[str] = Counter()
        # What a lost worker had counted is lost with it.
        for place, (token, counted) in answers_of(self._actors, "take_seconds").items():
            self._tokens.setdefault(place, token)
            total.update(counted)
        return dict(total)

    def revive(self) -> Sequence[str]:
        """Wait for all workers, or else go on with those whose nodes are still there.

        Who stays away is not given up: when something happens again, it is asked again. Who is
        there but does not answer is started anew.
        """
        before = self.num_workers
        start = time.monotonic()
        pause = 0.2
        is_stuck = False
        while True:
            present = _roll_call(self._all)
            elapsed = time.monotonic() - start
            if len(present) == len(self._all) or (present and elapsed > _REPLACEMENT_SECONDS):
                break
            if elapsed > _PATIENCE_SECONDS:
                raise ExecutorError(
                    f"no worker came back within {_PATIENCE_SECONDS:g} s; check the cluster's "
                    "nodes, then resume"
                )
            if elapsed > _STUCK_SECONDS and not is_stuck:
                is_stuck = True
                for place, actor in enumerate(self._all):
                    if place not in present:
                        ray.kill(actor, no_restart=False)
            time.sleep(pause)
            pause = min(2 * pause, 5.0)
        self._actors = [self._all[place] for place in sorted(present)]
        self._tokens = {i: present[place][0] for i, place in enumerate(sorted(present))}
        self.num_workers = len(self._actors)
        if self.num_workers == before:
            return ()
        return (f"goes on with {self.num_workers} of {len(self._all)} workers",)

    def process_ids(self) -> list[int]:
        """Of the workers, on their nodes."""
        answers = answers_of(self._actors, "process_id", copies=_COPIES)
        return [answers[place] for place in sorted(answers)]


def _roll_call(actors: Sequence[Any]) -> dict[int, tuple[str, bool]]:
    return answers_of(actors, "roll_call", copies=_COPIES)


class _Actor:
    """A worker in a process of its own. The driver that defines it stays free of JAX."""

    def __init__(self, source_url: str, run_url: str, folder: str) -> None:
        import keras

        # Paths of texts are meant from where the user is. On a machine without that folder they
        # must not be found somewhere else by chance: then they are named as missing.
        os.chdir(folder if Path(folder).is_dir() else "/")
        # What takes long is done before the first call.
        importlib.import_module("pipeline.worker.worker")
        if keras.backend.backend() != "jax":
            raise ExecutorError(
                f"a worker started with Keras on {keras.backend.backend()}, not JAX"
            )
        self._urls = source_url, run_url
        self._timed: TimedWorker | None = None
        self._making = threading.Lock()
        self._counting = threading.Lock()
        self._num_calls = 0
        self._token = secrets.token_hex(8)

    def call(self, method: str, *args: Any) -> tuple[None, Any]:
        with self._at_work():
            return None, self._worker().call(method, *args)

    def run(self, function: Callable[..., Any], *args: Any) -> tuple[None, Any]:
        with self._at_work():
            return None, function(*args)

    def roll_call(self) -> tuple[str, bool]:
        """Who this is, another after every start; and whether it works."""
        return self._token, self._num_calls > 0

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        with self._counting:
            self._num_calls += 1
        try:
            yield
        finally:
            with self._counting:
                self._num_calls -= 1

    def take_seconds(self) -> tuple[str, Mapping[str, float]]:
        """Who this is, and what it counted."""
        return self._token, {} if self._timed is None else self._timed.take_seconds()

    def _worker(self) -> TimedWorker:
        """Made by the first call: what fails here reaches the driver, as an actor's end does not.

        Two of them may come at once, one to read.
        """
        from pipeline.worker.worker import Worker

        with self._making:
            if self._timed is None:
                # From storage: a plan is too large for an argument that restarts must find.
                plan = read_plan(open_store(self._urls[1]))
                self._timed = TimedWorker(Worker(plan, *self._urls))
            return self._timed

    def process_id(self) -> int:
        return os.getpid()
