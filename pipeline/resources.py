"""What a run takes of the cluster that was joined: workers, threads, memory, GPUs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ray

from pipeline.autoscaling import await_nodes
from pipeline.crew import CrewError
from pipeline.storage.patience import PATIENCE_VARIABLE


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
        CrewError: more is asked than the cluster has, or gets in time (see `await_nodes`).
    """
    await_nodes(workers, threads, gpu=device == "gpu")
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
    threads = threads or _most_threads(cpus, workers or len(cpus))
    room = sum(count // threads for count in cpus)
    workers = workers or max(1, room)
    if workers > room:
        raise CrewError(
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
