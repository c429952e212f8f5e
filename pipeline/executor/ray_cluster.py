"""This process as a part of a Ray cluster, for a while.

What a run takes of the cluster that was joined: workers, threads, memory, GPUs.

Nodes that are not there yet: ask the cluster's autoscaler for them, and wait.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources

from pipeline.executor.protocol import ExecutorError
from pipeline.storage.backend import PATIENCE_VARIABLE

_CODE = Path(__file__).parents[2]
_ASK_SECONDS = 5.0
_HEAD_SECONDS = 30.0
"""How long a head may be away. After twice that, Ray ends this process without a word of ours."""


@contextlib.contextmanager
def joined(address: str | None, wanted_cpus: int | None = None) -> Iterator[None]:
    """Join the cluster at `address`, or start one on this machine, for the time of the block.

    Args:
        address: as `ray.init` takes it; None starts a cluster of this machine alone.
        wanted_cpus: logical CPUs of a cluster that is started; None for what the machine has.

    Raises:
        ExecutorError: there is no cluster at the address, or it is a Ray Client's.
    """
    if address is not None and address.startswith("ray://"):
        raise ExecutorError(
            f"{address}: a Ray Client cannot drive a run; on a machine of the cluster say "
            "--address auto, from elsewhere send the run as a job with quantfleet submit"
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Of calls that are given up; what matters is asked for.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
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
        # Ray puts this folder before all others that workers import from. Were it the caller's, a
        # folder of theirs named "pipeline" would be taken for this package.
        with contextlib.chdir(_CODE):
            ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        reason = " ".join(str(error).split())
        raise ExecutorError(
            f"no Ray cluster at {address}: {reason}; check --address, or leave it out to start one "
            "on this machine"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _check_that_somebody_listens(address: str) -> None:
    """Ray itself would wait for minutes, and fill the terminal meanwhile."""
    if not address.rpartition(":")[2].isdigit():
        return
    try:
        _knock(address, timeout=10)
    except OSError as error:
        raise ExecutorError(
            f"no Ray cluster at {address}: {error}; check --address, or leave it out to start one "
            "on this machine"
        ) from None


def _knock(address: str, timeout: float) -> None:
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=timeout).close()


class Head:
    """The head of the cluster that this process has joined."""

    def __init__(self) -> None:
        self._address = str(ray.get_runtime_context().gcs_address)
        self._asked = time.monotonic()
        self._away_since: float | None = None

    def check(self) -> None:
        """Ask now and then whether it is there.

        Raises:
            ExecutorError: it has not been for half a minute.
        """
        now = time.monotonic()
        if now - self._asked < _ASK_SECONDS:
            return
        self._asked = now
        try:
            _knock(self._address, timeout=_ASK_SECONDS)
        except OSError as error:
            if self._away_since is None:
                self._away_since = now
            if now - self._away_since > _HEAD_SECONDS:
                raise ExecutorError(
                    f"the head of the Ray cluster at {self._address} has been away for "
                    f"{now - self._away_since:.0f} s ({error}); start it again, or another "
                    "cluster, then resume"
                ) from None
        else:
            self._away_since = None


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


def choose_resources(workers: int | None, threads: int | None, *, device: str) -> Resources:
    """What a run takes of the cluster that was joined, where the user did not say.

    One worker a node that uses all its CPUs, or one a GPU.

    Raises:
        ExecutorError: more is asked than the cluster has, or gets in time (see `await_nodes`).
    """
    await_nodes(workers, threads, gpu=device == "gpu")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    cpus = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    if not cpus:
        raise ExecutorError("the cluster has no CPU for workers; add a node, or wait for one")
    if device == "gpu" and not gpus:
        raise ExecutorError("the cluster has no GPU; use --device cpu, or add a node with one")
    on_gpu = gpus > 0 and device != "cpu"
    if on_gpu:
        threads = threads or max(1, sum(cpus) // gpus)
        workers = workers or gpus
        if workers > gpus:
            raise ExecutorError(f"{workers} workers need as many GPUs; the cluster has {gpus}")
        return Resources(workers=workers, threads=threads, gpus=1)
    threads = threads or _most_threads(cpus, workers or len(cpus))
    room = sum(count // threads for count in cpus)
    workers = workers or max(1, room)
    if workers > room:
        raise ExecutorError(
            f"{workers} workers of {threads} threads do not fit the cluster's {sum(cpus)} CPUs "
            f"(room for {room}); ask for fewer --workers or --threads"
        )
    return Resources(workers=workers, threads=threads)


def _most_threads(cpus: Sequence[int], workers: int) -> int:
    """As many for each of so many workers as the nodes have CPUs for; at least one."""
    fitting = (t for t in range(min(cpus), 1, -1) if sum(c // t for c in cpus) >= workers)
    return next(fitting, 1)


def memory_of_nodes(resources: Resources) -> list[tuple[int, int]]:
    """Of each node that has room for workers: how many at most, and bytes of memory for them."""
    found = []
    for node in ray.nodes():
        have = node["Resources"]
        if resources.gpus:
            room = int(have.get("GPU", 0))
        else:
            room = int(have.get("CPU", 0)) // resources.threads
        if node["Alive"] and room:
            found.append((min(room, resources.workers), int(have.get("memory", 0))))
    return found


def worker_environment(resources: Resources) -> dict[str, str]:
    """Environment variables of every process that computes; no secrets among them."""
    # In the home directory: programs from where others may write are not to be trusted.
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = home / "quantfleet" / "xla"
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
        # glibc would keep what each thread has freed apart from the others.
        "MALLOC_ARENA_MAX": "1",
        # Large pages where the kernel has them: a worker touches gigabytes anew, and on a virtual
        # machine a page fault is slow. Of two settings the last counts: the user's.
        "GLIBC_TUNABLES": ":".join(
            filter(None, ("glibc.malloc.hugetlb=1", os.environ.get("GLIBC_TUNABLES")))
        ),
    }
    if not resources.gpus:
        environment["JAX_PLATFORMS"] = "cpu"
    if PATIENCE_VARIABLE in os.environ:
        environment[PATIENCE_VARIABLE] = os.environ[PATIENCE_VARIABLE]
    return environment


NODE_PATIENCE_VARIABLE = "QUANTFLEET_NODE_PATIENCE"
"""Environment variable: seconds to wait for nodes that a run needs; 0, or unset, for none."""
_LOOK_SECONDS = 2.0


def await_nodes(workers: int | None, threads: int | None, *, gpu: bool) -> None:
    """Ask for room for so many workers, where the environment says that nodes may yet come.

    Args:
        workers, threads: as the user said; None asks for one.
        gpu: one for each worker.

    Raises:
        ExecutorError: they did not come in time, or the patience is no number of seconds.
    """
    patience = _patience_seconds()
    bundle = {"CPU": float(threads or 1)} | ({"GPU": 1.0} if gpu else {})
    wanted = workers or 1
    if not patience or _room(bundle) >= wanted:
        return
    request_resources(bundles=[bundle] * wanted)
    try:
        deadline = time.monotonic() + patience
        while _room(bundle) < wanted:
            if time.monotonic() > deadline:
                raise ExecutorError(
                    f"{wanted} workers need {bundle} each, and the cluster did not get nodes for "
                    f"them within {patience:g} s; raise {NODE_PATIENCE_VARIABLE}, or look at the "
                    "autoscaler's limits with ray status"
                )
            time.sleep(_LOOK_SECONDS)
    finally:
        # From now on the workers themselves say what is needed.
        request_resources(bundles=[])


def _room(bundle: dict[str, float]) -> int:
    """Workers that fit the nodes which are there, whatever else they do."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(
        int(min(have.get(name, 0.0) // amount for name, amount in bundle.items())) for have in nodes
    )


def _patience_seconds() -> float:
    given = os.environ.get(NODE_PATIENCE_VARIABLE, "0")
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ExecutorError(f"{NODE_PATIENCE_VARIABLE} must be a number of seconds, not {given!r}")
    return seconds
