"""The door to Ray: start or join a cluster, keep a crew of warm worker actors on it."""

from __future__ import annotations

import contextlib
import getpass
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import exceptions

from pipeline.crew import CrewError, TimedWorker, WorkerLostError

# What a repetition on other, or restarted, processes can mend.
_LOST = (
    exceptions.ActorDiedError,
    exceptions.ActorUnavailableError,
    exceptions.WorkerCrashedError,
    exceptions.NodeDiedError,
    exceptions.ObjectLostError,
    exceptions.OwnerDiedError,
    exceptions.RaySystemError,
)
_IO_METHODS = frozenset({"read"})
_PATIENCE_SECONDS = 600.0
_MEMORY_SHARE_OF_OBJECTS = 0.3


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What workers a run gets.

    Attributes:
        workers: how many.
        threads: of each one's matrix products.
        gpus: of each one: 0 or 1.
    """

    workers: int
    threads: int
    gpus: int = 0


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


def choose_resources(workers: int | None, threads: int | None, *, device: str) -> Resources:
    """What a run takes of the cluster that was joined, where the user did not say.

    One worker a node that uses all its CPUs, or one a GPU.

    Raises:
        CrewError: more is asked than the cluster has.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    cpus = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    if not cpus:
        raise CrewError("the cluster has no CPU for workers; add a node, or wait for one")
    if device == "gpu" and not gpus:
        raise CrewError("the cluster has no GPU; use --device cpu, or add a node with one")
    on_gpu = gpus > 0 and device != "cpu"
    if on_gpu:
        threads = threads or max(1, sum(cpus) // gpus)
        workers = workers or gpus
        if workers > gpus:
            raise CrewError(f"{workers} workers need as many GPUs; the cluster has {gpus}")
        return Resources(workers=workers, threads=threads, gpus=1)
    threads = threads or min(cpus)
    room = sum(count // threads for count in cpus)
    workers = workers or max(1, room)
    if workers > room:
        raise CrewError(
            f"{workers} workers of {threads} threads do not fit the cluster's {sum(cpus)} CPUs "
            f"(room for {room}); ask for fewer --workers or --threads"
        )
    return Resources(workers=workers, threads=threads)


def worker_environment(resources: Resources) -> dict[str, str]:
    """Environment variables of every process that computes; no secrets among them."""
    cache = Path(tempfile.gettempdir()) / f"quantfleet-xla-{getpass.getuser()}"
    environment = {
        # Without it Keras takes TensorFlow.
        "KERAS_BACKEND": "jax",
        # The size of XLA's thread pool, on which the rounding of its products depends.
        "NPROC": str(resources.threads),
        "OMP_NUM_THREADS": str(resources.threads),
        "OPENBLAS_NUM_THREADS": str(resources.threads),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    if not resources.gpus:
        environment["JAX_PLATFORMS"] = "cpu"
    return environment


def run_once(function: Callable[..., Any], resources: Resources, *args: Any) -> Any:
    """Call a function in a process of the cluster, in the workers' environment.

    Raises:
        Exception: what the function raised.
    """
    task = ray.remote(
        num_cpus=resources.threads,
        num_gpus=resources.gpus,
        max_retries=3,
        runtime_env={"env_vars": worker_environment(resources)},
    )(function)
    return _get([task.remote(*args)])[0]


class RayCrew:
    """Worker actors that Ray restarts as often as they die."""

    def __init__(self, resources: Resources, *worker_args: Any) -> None:
        self.num_workers = resources.workers
        options: dict[str, Any] = {
            "num_cpus": resources.threads,
            "num_gpus": resources.gpus,
            "max_restarts": -1,
            # A call is repeated by the driver, which first brings the worker's shards back.
            "max_task_retries": 0,
            # The next block is read while this one is solved.
            "concurrency_groups": {"io": 1},
            "runtime_env": {"env_vars": worker_environment(resources)},
        }
        actor: Any = ray.remote(**options)(_Actor)
        self._actors: list[Any] = [actor.remote(*worker_args) for _ in range(resources.workers)]

    def submit(self, worker: int, method: str, *args: Any, num_returns: int = 1) -> Any:
        options: dict[str, Any] = {"num_returns": num_returns}
        if method in _IO_METHODS:
            options["concurrency_group"] = "io"
        return self._actors[worker].call.options(**options).remote(method, *args)

    def fetch(self, handles: Sequence[Any]) -> list[Any]:
        return _get(handles)

    def seconds(self) -> dict[str, float]:
        total: Counter[str] = Counter()
        for taken in _get([actor.take_seconds.remote() for actor in self._actors]):
            total.update(taken)
        return dict(total)

    def revive(self) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        pause = 0.2
        while True:
            try:
                _get([actor.take_seconds.remote() for actor in self._actors])
                return
            except WorkerLostError as error:
                if time.monotonic() > deadline:
                    raise CrewError(
                        f"workers did not come back within {_PATIENCE_SECONDS:g} s ({error}); "
                        "check the cluster's nodes, then resume"
                    ) from error
                time.sleep(pause)
                pause = min(2 * pause, 5.0)

    def process_ids(self) -> list[int]:
        """Of the workers, on their nodes."""
        return [int(pid) for pid in _get([actor.process_id.remote() for actor in self._actors])]


class _Actor:
    """A worker in a process of its own. The driver that defines it stays free of JAX."""

    def __init__(self, *worker_args: Any) -> None:
        import keras

        from pipeline.worker import Worker

        if keras.backend.backend() != "jax":
            raise CrewError(f"a worker started with Keras on {keras.backend.backend()}, not JAX")
        self._timed = TimedWorker(Worker(*worker_args))

    def call(self, method: str, *args: Any) -> Any:
        return self._timed.call(method, *args)

    def take_seconds(self) -> Mapping[str, float]:
        return self._timed.take_seconds()

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
