"""The door to Ray: start or join a cluster, keep a crew of warm worker actors on it."""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray
from ray import exceptions

from pipeline.crew import CrewError, TimedWorker, WorkerLostError
from pipeline.plan import read_plan
from pipeline.resources import Resources, worker_environment
from pipeline.storage.object_store import open_store

# What a repetition on other, or restarted, processes can mend.
_LOST = (
    exceptions.ActorDiedError,
    exceptions.ActorUnavailableError,
    exceptions.WorkerCrashedError,
    exceptions.NodeDiedError,
    exceptions.ObjectLostError,
    exceptions.OwnerDiedError,
    exceptions.OutOfMemoryError,
    exceptions.RaySystemError,
)
_IO_METHODS = frozenset({"read"})
_PATIENCE_SECONDS = 600.0
"""How long workers may all be away before a run ends."""
_ANSWER_SECONDS = 10.0
_MOST_RUNS = 4
_LOOK_SECONDS = 15.0
# Large arguments travel while nobody works.
_MOST_IDLE_LOOKS = 3
_MOST_SILENT_LOOKS = 6
_STUCK_SECONDS = 30.0
_REPLACEMENT_SECONDS = 60.0
"""How long the last of them are waited for, once others are back."""


@contextlib.contextmanager
def joined(address: str | None, wanted_cpus: int | None = None) -> Iterator[None]:
    """Join the cluster at `address`, or start one on this machine, for the time of the block.

    Args:
        address: as `ray.init` takes it; None starts a cluster of this machine alone.
        wanted_cpus: logical CPUs of a cluster that is started; None for what the machine has.

    Raises:
        CrewError: there is no cluster at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": "ERROR",
        "configure_logging": True,
    }
    if address is None:
        # A cluster of this process alone: nobody else has its ports' addresses, and Ray would
        # otherwise leave a token file in the home directory.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        options |= {"address": "local", "include_dashboard": False, "num_cpus": wanted_cpus}
    else:
        _check_that_somebody_listens(address)
        options |= {"address": address}
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        reason = " ".join(str(error).split())
        raise CrewError(
            f"no Ray cluster at {address}: {reason}; check --address, or leave it out to start one "
            "on this machine"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _check_that_somebody_listens(address: str) -> None:
    """Ray itself would wait for minutes, and fill the terminal meanwhile."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise CrewError(
            f"no Ray cluster at {address}: {error}; check --address, or leave it out to start one "
            "on this machine"
        ) from None


class RayCrew:
    """Worker actors that Ray restarts as often as they die."""

    def __init__(self, resources: Resources, source_url: str, run_url: str) -> None:
        """Start workers; what is asked of them but `run` needs a run claimed at `run_url`."""
        self.num_workers = resources.workers
        options: dict[str, Any] = {
            "num_cpus": resources.threads,
            "num_gpus": resources.gpus,
            "max_restarts": -1,
            # A call is repeated by the driver, which first brings the worker's shards back.
            "max_task_retries": 0,
            # The next block is read while this one is solved.
            "concurrency_groups": {"io": 1, "roll_call": 1},
            "runtime_env": {"env_vars": worker_environment(resources)},
        }
        actor: Any = ray.remote(**options)(_Actor)
        self._all: list[Any] = [actor.remote(source_url, run_url) for _ in range(resources.workers)]
        self._actors = list(self._all)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function of a module in the first worker's process, which has JAX and Keras.

        Raises:
            CrewError: the process is lost again and again.
            Exception: what the function raised.
        """
        for _ in range(_MOST_RUNS):
            try:
                return self.fetch([self._actors[0].run.remote(function, *args)])[0]
            except WorkerLostError as error:
                last = error
                self.revive()
        raise CrewError(
            f"a worker that prepares the run was lost {_MOST_RUNS} times ({last}); check the "
            "memory of the cluster's nodes, then try again"
        )

    def submit(self, worker: int, method: str, *args: Any) -> Any:
        call = self._actors[worker].call
        if method in _IO_METHODS:
            call = call.options(concurrency_group="io")
        return call.remote(method, *args)

    def fetch(self, handles: Sequence[Any]) -> list[Any]:
        """Wait, as long as anybody works: a call whose message was lost would never be answered."""
        pending = list(dict.fromkeys(handles))
        quiet = 0
        while pending:
            _, pending = ray.wait(
                pending, num_returns=len(pending), timeout=_LOOK_SECONDS, fetch_local=False
            )
            if not pending:
                break
            answers = _ask(self._actors, "is_busy")
            quiet = 0 if any(answers.values()) else quiet + 1
            all_idle = len(answers) == len(self._actors)
            # Who says nothing may be starting, or may never have heard the question.
            if quiet >= (_MOST_IDLE_LOOKS if all_idle else _MOST_SILENT_LOOKS):
                raise WorkerLostError("nobody works, and nothing arrives: calls were lost")
        return _get(handles)

    def seconds(self) -> dict[str, float]:
        total: Counter[str] = Counter()
        # What a lost worker had counted is lost with it.
        for counted in _ask(self._actors, "take_seconds").values():
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
            present = _ask(self._all, "is_busy")
            elapsed = time.monotonic() - start
            if len(present) == len(self._all) or (present and elapsed > _REPLACEMENT_SECONDS):
                break
            if elapsed > _PATIENCE_SECONDS:
                raise CrewError(
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
        self.num_workers = len(self._actors)
        if self.num_workers == before:
            return ()
        return (f"goes on with {self.num_workers} of {len(self._all)} workers",)

    def process_ids(self) -> list[int]:
        """Of the workers, on their nodes."""
        return [int(pid) for pid in _get([actor.process_id.remote() for actor in self._actors])]


def _ask(actors: Sequence[Any], question: str) -> dict[int, Any]:
    """The answers of those that give one now, whatever else they do, by their place."""
    asked = {
        getattr(actor, question).options(concurrency_group="roll_call").remote(): place
        for place, actor in enumerate(actors)
    }
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_SECONDS)
    answers = {}
    for handle in answered:
        with contextlib.suppress(WorkerLostError):
            answers[asked[handle]] = _get([handle])[0]
    return answers


class _Actor:
    """A worker in a process of its own. The driver that defines it stays free of JAX."""

    def __init__(self, source_url: str, run_url: str) -> None:
        import keras

        # What takes long is done before the first call.
        importlib.import_module("pipeline.compute.worker")
        if keras.backend.backend() != "jax":
            raise CrewError(f"a worker started with Keras on {keras.backend.backend()}, not JAX")
        self._urls = source_url, run_url
        self._timed: TimedWorker | None = None
        self._making = threading.Lock()
        self._counting = threading.Lock()
        self._num_calls = 0

    def call(self, method: str, *args: Any) -> Any:
        with self._at_work():
            return self._worker().call(method, *args)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        with self._at_work():
            return function(*args)

    def is_busy(self) -> bool:
        return self._num_calls > 0

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        with self._counting:
            self._num_calls += 1
        try:
            yield
        finally:
            with self._counting:
                self._num_calls -= 1

    def take_seconds(self) -> Mapping[str, float]:
        return {} if self._timed is None else self._timed.take_seconds()

    def _worker(self) -> TimedWorker:
        """Made by the first call: what fails here reaches the driver, as an actor's end does not.

        Two of them may come at once, one to read.
        """
        from pipeline.compute.worker import Worker

        with self._making:
            if self._timed is None:
                # From storage: a plan is too large for an argument that restarts must find.
                plan = read_plan(open_store(self._urls[1]))
                self._timed = TimedWorker(Worker(plan, *self._urls))
            return self._timed

    def process_id(self) -> int:
        return os.getpid()


def _get(handles: Sequence[Any]) -> list[Any]:
    try:
        return list(ray.get(list(handles)))
    except exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, _LOST):
            raise WorkerLostError(type(cause).__name__) from error
        raise cause from error
    except _LOST as error:
        raise WorkerLostError(type(error).__name__) from error
    except exceptions.RayError as error:
        reason = " ".join(str(error).split())[:300]
        raise CrewError(
            f"the Ray cluster failed ({type(error).__name__}: {reason}); check it, then resume"
        ) from error
