"""What workers a run gets of the nodes that there are.

Decided without Ray, so that planning need not wait for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.executor.protocol import Allocation, ComputeSpec, ExecutorError, NodeRoom

_OBJECT_STORE_SHARE = 0.3
"""Of the available memory: what Ray takes for the objects that workers exchange."""


@dataclass(frozen=True, kw_only=True)
class NodeResources:
    """What one node has for workers.

    Attributes:
        accelerator: the kind of its GPUs, as Ray names it, such as H100; "" if it is not known.
    """

    cpus: int
    gpus: int = 0
    memory_bytes: int = 0
    accelerator: str = ""


def allocate(spec: ComputeSpec, nodes: Sequence[NodeResources]) -> Allocation:
    """Give a run what it asks for, or else one worker per node with all its CPUs and GPUs.

    GPUs of one worker copy sums to each other directly, and share what one of them has factored or
    decoded. Of GPUs all workers get the same kind, since others round differently, and the same
    number: one each where nodes have different numbers. Nodes without them do not count then, since
    no worker can be there.

    Raises:
        ExecutorError: the nodes have less than is asked for, or GPUs of several kinds of which the
            user names none.
    """
    if not any(node.cpus for node in nodes):
        raise ExecutorError("the cluster has no CPU for workers; add a node, or wait for one")
    on_gpus = spec.device != "cpu" and any(node.gpus for node in nodes)
    if spec.device == "gpu" and not on_gpus:
        raise ExecutorError("the cluster has no GPU; use --device cpu, or add a node with one")
    if not on_gpus:
        _refuse_gpu_options(spec)
    else:
        nodes = _of_one_kind([node for node in nodes if node.gpus], spec.accelerator)
        _check_gpus(nodes, spec)
    gpus = _gpus_each(nodes, spec) if on_gpus else 0
    # Where the user does not say: one per node, or as many as its GPUs are enough for.
    each = (_room(node, 1, gpus) if on_gpus else min(node.cpus, 1) for node in nodes)
    workers = spec.workers or sum(each)
    threads = spec.threads or _most_threads(nodes, workers, gpus)
    room = [_room(node, threads, gpus) for node in nodes]
    workers = spec.workers or max(1, sum(room))
    if workers > sum(room):
        raise ExecutorError(
            f"{workers} workers of {threads} threads do not fit the cluster's "
            f"{sum(node.cpus for node in nodes)} CPUs{' beside GPUs' if on_gpus else ''} "
            f"(room for {sum(room)}); ask for fewer --workers or --threads"
        )
    return Allocation(
        workers=workers,
        threads=threads,
        gpus=gpus,
        accelerator=nodes[0].accelerator if on_gpus else "",
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


def _refuse_gpu_options(spec: ComputeSpec) -> None:
    """Refuse what is asked of GPUs where there are none; CPUs would round otherwise, and take long.

    Raises:
        ExecutorError: the user says what GPUs workers are to have.
    """
    asked = {
        "--gpus-per-worker, or gpus_per_worker in a catalog": spec.gpus_per_worker,
        "--accelerator, or accelerator in a catalog": spec.accelerator,
    }
    for option, value in asked.items():
        if value is not None:
            raise ExecutorError(
                f"{option}, is {value}, and the cluster has no GPU; leave it out to run on CPUs, "
                "or add a node with GPUs"
            )


def _of_one_kind(nodes: Sequence[NodeResources], wanted: str | None) -> list[NodeResources]:
    """The nodes with GPUs of the kind that the user wants, or else of the only kind there is."""
    kinds = sorted({node.accelerator for node in nodes})
    found = ", ".join(
        f"{_number_of_gpus([node for node in nodes if node.accelerator == kind])} × "
        f"{kind or 'of an unknown kind'}"
        for kind in kinds
    )
    if wanted is not None and wanted not in kinds:
        raise ExecutorError(
            f"--accelerator {wanted}: the cluster has no such GPU, but {found}; name one of these"
        )
    if wanted is None and len(kinds) > 1:
        raise ExecutorError(
            f"the cluster has GPUs of several kinds, which round differently: {found}; say which "
            f"the run is to take, such as --accelerator {next(filter(None, kinds))}"
        )
    return [node for node in nodes if wanted is None or node.accelerator == wanted]


def _check_gpus(nodes: Sequence[NodeResources], spec: ComputeSpec) -> None:
    gpus, each = _number_of_gpus(nodes), spec.gpus_per_worker or 1
    if each > max(node.gpus for node in nodes):
        raise ExecutorError(
            f"--gpus-per-worker {each}: no node of the cluster has so many, but "
            f"{max(node.gpus for node in nodes)} at most; ask for no more than that"
        )
    fitting = sum(node.gpus // each for node in nodes)
    if spec.workers is not None and spec.workers > fitting:
        need = "as many GPUs" if each == 1 else f"{each} GPUs of one node each"
        raise ExecutorError(
            f"{spec.workers} workers need {need}; the cluster has {gpus}"
            + ("" if each == 1 else f", enough for {fitting}")
        )
    if not sum(_room(node, 1, each) for node in nodes):
        raise ExecutorError("the cluster's nodes with GPUs have no CPU for workers; give them some")


def _gpus_each(nodes: Sequence[NodeResources], spec: ComputeSpec) -> int:
    """GPUs of each worker: of each node an equal part, and the largest that leaves enough.

    Nodes without the CPUs for a worker do not count, since none can be there.
    """
    if spec.gpus_per_worker is not None or spec.one_gpu_each:
        return spec.gpus_per_worker or 1
    threads = spec.threads or 1
    nodes = [node for node in nodes if node.cpus >= threads]
    numbers = {node.gpus for node in nodes}
    if len(numbers) != 1:
        return 1
    [most] = numbers
    fitting = (
        number
        for number in range(most, 1, -1)
        if most % number == 0
        and sum(_room(node, threads, number) for node in nodes) >= (spec.workers or 1)
    )
    return next(fitting, 1)


def _number_of_gpus(nodes: Sequence[NodeResources]) -> int:
    return sum(node.gpus for node in nodes)


def _room(node: NodeResources, threads: int, gpus: int) -> int:
    """How many workers of so many threads and GPUs fit a node."""
    return min(node.gpus // gpus, node.cpus // threads) if gpus else node.cpus // threads


def _most_threads(nodes: Sequence[NodeResources], workers: int, gpus: int) -> int:
    """The most threads per worker, such that so many workers fit the nodes; at least one.

    No more than the smallest node has CPUs, so that each can hold one.
    """
    fitting = (
        threads
        for threads in range(min(node.cpus for node in nodes if node.cpus), 1, -1)
        if sum(_room(node, threads, gpus) for node in nodes) >= workers
    )
    return next(fitting, 1)


def this_machine(spec: ComputeSpec) -> NodeResources:
    """What this machine has for a cluster of its own; CPUs are logical where more are asked for."""
    cpus = _usable_cpus()
    if spec.workers is not None:
        cpus = max(cpus, spec.workers * (spec.threads or 1))
    memory = int(available_memory_bytes() * (1 - _OBJECT_STORE_SHARE))
    return NodeResources(cpus=cpus, memory_bytes=memory)


def may_have_gpu() -> bool:
    """Whether this machine may have a GPU; how many there are, and of which kind, Ray finds out.

    One of NVIDIA's: workers compute on no others.
    """
    return any(Path("/dev").glob("nvidia[0-9]*"))


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
