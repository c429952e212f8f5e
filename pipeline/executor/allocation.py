"""What workers a run gets of the nodes that there are, and the environment that they start with.

Decided without Ray, so that planning need not wait for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.executor.protocol import Allocation, ComputeSpec, ExecutorError, NodeRoom
from pipeline.storage.backend import PATIENCE_VARIABLE

_OBJECT_STORE_SHARE = 0.3
"""Of the available memory: what Ray takes for the objects that workers exchange."""


@dataclass(frozen=True, kw_only=True)
class NodeResources:
    """What one node has for workers."""

    cpus: int
    gpus: int = 0
    memory_bytes: int = 0


def allocate(spec: ComputeSpec, nodes: Sequence[NodeResources]) -> Allocation:
    """Give a run what it asks for, or else one worker per node with all its CPUs, or one per GPU.

    Raises:
        ExecutorError: the nodes have less than is asked for.
    """
    gpus = sum(node.gpus for node in nodes)
    cpus = [node.cpus for node in nodes if node.cpus]
    workers, threads = spec.workers, spec.threads
    if not cpus:
        raise ExecutorError("the cluster has no CPU for workers; add a node, or wait for one")
    if spec.device == "gpu" and not gpus:
        raise ExecutorError("the cluster has no GPU; use --device cpu, or add a node with one")
    if gpus and spec.device != "cpu":
        threads = threads or max(1, sum(cpus) // gpus)
        workers = workers or gpus
        if workers > gpus:
            raise ExecutorError(f"{workers} workers need as many GPUs; the cluster has {gpus}")
        room = [node.gpus for node in nodes]
    else:
        threads = threads or _most_threads(cpus, workers or len(cpus))
        room = [node.cpus // threads for node in nodes]
        workers = workers or max(1, sum(room))
        if workers > sum(room):
            raise ExecutorError(
                f"{workers} workers of {threads} threads do not fit the cluster's {sum(cpus)} CPUs "
                f"(room for {sum(room)}); ask for fewer --workers or --threads"
            )
    return Allocation(
        workers=workers,
        threads=threads,
        gpus=1 if gpus and spec.device != "cpu" else 0,
        nodes=tuple(
            NodeRoom(
                workers=min(count, workers),
                memory_bytes=min(
                    node.memory_bytes,
                    min(count, workers) * (spec.memory_bytes or node.memory_bytes),
                ),
            )
            for count, node in zip(room, nodes, strict=True)
            if count
        ),
    )


def _most_threads(cpus: Sequence[int], workers: int) -> int:
    """The most threads per worker, such that so many workers fit the nodes; at least one."""
    fitting = (t for t in range(min(cpus), 1, -1) if sum(c // t for c in cpus) >= workers)
    return next(fitting, 1)


def this_machine(spec: ComputeSpec) -> NodeResources:
    """What this machine has for a cluster of its own; CPUs are logical where more are asked for."""
    cpus = _usable_cpus()
    if spec.workers is not None:
        cpus = max(cpus, spec.workers * (spec.threads or 1))
    memory = int(available_memory_bytes() * (1 - _OBJECT_STORE_SHARE))
    return NodeResources(cpus=cpus, memory_bytes=memory)


def may_have_gpu() -> bool:
    """Whether this machine may have a GPU; how many there are, and of which kind, Ray finds out."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()


def _usable_cpus() -> int:
    """CPUs that this process may use: by its affinity, and by its control groups' quotas."""
    cpus = len(os.sched_getaffinity(0))
    for group in _control_groups("cpu"):
        # "max 100000" in one file, or two files; a quota of "max" or -1 is none.
        setting = _read(group / "cpu.max") or " ".join(
            _read(group / f"cpu.cfs_{name}_us") for name in ("quota", "period")
        )
        quota, _, period = setting.partition(" ")
        if quota.isdigit() and period.isdigit() and int(period):
            cpus = min(cpus, int(quota) // int(period))
    return max(1, cpus)


def available_memory_bytes() -> int:
    """Memory that is neither used here nor beyond the control groups' limits."""
    fields = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text("ascii").splitlines()
    )
    available = int(fields["MemAvailable"].split()[0]) * 1024
    for group in _control_groups("memory"):
        limit = _read(group / "memory.max") or _read(group / "memory.limit_in_bytes")
        used = _read(group / "memory.current") or _read(group / "memory.usage_in_bytes")
        if limit.isdigit() and used.isdigit():
            available = min(available, int(limit) - int(used))
    return max(0, available)


_CONTROL_GROUPS = Path("/sys/fs/cgroup")
_OWN_CONTROL_GROUPS = Path("/proc/self/cgroup")


def _control_groups(controller: str) -> Iterator[Path]:
    """Folders of the control groups that limit this process: its own and all that hold it.

    Of both versions. In a container its own group may be mounted as the root, and be named as the
    host sees it: what does not exist is left out by who reads it.
    """
    for line in _read(_OWN_CONTROL_GROUPS).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            roots = [_CONTROL_GROUPS, _CONTROL_GROUPS / "unified"]
        elif controller in controllers.split(","):
            roots = [_CONTROL_GROUPS / controllers, _CONTROL_GROUPS / controller]
        else:
            continue
        own = PurePosixPath(path.lstrip("/"))
        for root in roots:
            yield from (root / group for group in (own, *own.parents))


def _read(file: Path) -> str:
    """What a file of the kernel's says; "" where there is none."""
    try:
        return file.read_text("ascii").strip()
    except OSError:
        return ""


_JAX_DEFAULTS = {
    "JAX_ENABLE_X64": "0",
    "JAX_DEFAULT_MATMUL_PRECISION": "default",
    "JAX_NUMPY_DTYPE_PROMOTION": "standard",
    "JAX_NUMPY_RANK_PROMOTION": "allow",
    "JAX_DISABLE_JIT": "0",
    "JAX_DEBUG_NANS": "0",
    "JAX_DEBUG_INFS": "0",
    "JAX_TRANSFER_GUARD": "allow",
}
"""JAX's settings that decide types and rounding, or what it refuses, as if nobody had set any."""


def worker_environment(allocation: Allocation) -> dict[str, str]:
    """Environment variables of every process that computes; no secrets among them."""
    # In the home directory: programs from where others may write are not to be trusted.
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = home / "quantfleet" / "xla"
    environment = {
        # Without it Keras takes TensorFlow.
        "KERAS_BACKEND": "jax",
        # Keras reads its dtype and epsilon from a file there, by default in the home directory.
        "KERAS_HOME": str(home / "quantfleet" / "keras"),
        "KERAS_NNX_ENABLED": "false",
        **_JAX_DEFAULTS,
        # May change how products are rounded: the same for all workers, and named in the plan.
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        # The size of XLA's thread pool, on which the rounding of its products depends.
        "NPROC": str(allocation.threads),
        "OMP_NUM_THREADS": str(allocation.threads),
        "OPENBLAS_NUM_THREADS": str(allocation.threads),
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
    if not allocation.gpus:
        environment["JAX_PLATFORMS"] = "cpu"
    if PATIENCE_VARIABLE in os.environ:
        environment[PATIENCE_VARIABLE] = os.environ[PATIENCE_VARIABLE]
    return environment
