"""What a run gets of nodes, decided without Ray."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.executor import allocation
from pipeline.executor.allocation import NodeResources, allocate, this_machine, worker_environment
from pipeline.executor.protocol import Allocation, ComputeSpec, ExecutorError, NodeRoom

GIB = 1 << 30
EIGHT = NodeResources(cpus=8, memory_bytes=16 * GIB)
TWO = NodeResources(cpus=2, memory_bytes=4 * GIB)
TWO_GPUS = NodeResources(cpus=8, gpus=2, memory_bytes=16 * GIB)


@pytest.mark.parametrize(
    ("nodes", "spec", "expected"),
    [
        # One worker per node, with as many threads as the smallest node has CPUs.
        ([EIGHT], ComputeSpec(), (1, 8, 0)),
        ([EIGHT, EIGHT], ComputeSpec(), (2, 8, 0)),
        ([EIGHT, TWO], ComputeSpec(), (5, 2, 0)),
        ([EIGHT], ComputeSpec(workers=2), (2, 4, 0)),
        ([EIGHT], ComputeSpec(workers=3), (3, 2, 0)),
        ([EIGHT], ComputeSpec(threads=2), (4, 2, 0)),
        ([EIGHT], ComputeSpec(workers=3, threads=2), (3, 2, 0)),
        # One worker per GPU, unless CPUs are asked for.
        ([TWO_GPUS], ComputeSpec(), (2, 4, 1)),
        ([TWO_GPUS, EIGHT], ComputeSpec(workers=1, device="gpu"), (1, 8, 1)),
        ([TWO_GPUS], ComputeSpec(device="cpu"), (1, 8, 0)),
    ],
)
def test_workers_threads_and_gpus(
    nodes: list[NodeResources], spec: ComputeSpec, expected: tuple[int, int, int]
) -> None:
    found = allocate(spec, nodes)
    assert (found.workers, found.threads, found.gpus) == expected


@pytest.mark.parametrize(
    ("nodes", "spec", "message"),
    [
        ([EIGHT], ComputeSpec(workers=9, threads=1), r"9 workers of 1 threads do not fit.*8 CPUs"),
        ([EIGHT], ComputeSpec(device="gpu"), "no GPU; use --device cpu"),
        ([TWO_GPUS], ComputeSpec(workers=3), "3 workers need as many GPUs; the cluster has 2"),
        ([NodeResources(cpus=0)], ComputeSpec(), "no CPU for workers"),
    ],
)
def test_more_than_there_is_is_refused(
    nodes: list[NodeResources], spec: ComputeSpec, message: str
) -> None:
    with pytest.raises(ExecutorError, match=message):
        allocate(spec, nodes)


def test_nodes_have_room_for_no_more_than_the_run_takes() -> None:
    found = allocate(ComputeSpec(workers=3, threads=2, memory_bytes=GIB), [EIGHT, TWO])
    assert found.nodes == (
        NodeRoom(workers=3, memory_bytes=3 * GIB),
        NodeRoom(workers=1, memory_bytes=1 * GIB),
    )
    with_gpu = allocate(ComputeSpec(), [TWO_GPUS, EIGHT])
    assert with_gpu.nodes == (NodeRoom(workers=2, memory_bytes=16 * GIB),)


def test_this_machine_is_what_the_process_may_use() -> None:
    found = this_machine(ComputeSpec())
    assert 1 <= found.cpus <= len(os.sched_getaffinity(0))
    assert found.memory_bytes > 1 << 28
    # More workers than CPUs share them.
    assert this_machine(ComputeSpec(workers=64)).cpus == 64


def test_one_cpu_is_one_thread_however_it_is_asked_for() -> None:
    usable = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(usable)})  # as taskset does
    try:
        for spec in (ComputeSpec(), ComputeSpec(workers=1)):
            found = allocate(spec, [this_machine(spec)])
            assert (found.workers, found.threads) == (1, 1)
    finally:
        os.sched_setaffinity(0, usable)


V1 = "5:memory:/job/step\n4:cpu,cpuacct:/job/step\n1:name=systemd:/elsewhere\n"
LIMITS = [
    # A container: its own group is the root.
    ("0::/\n", {"cpu.max": "150000 100000", "memory.max": 3 * GIB, "memory.current": GIB}),
    # The limit is the group's around the process's own.
    (
        "0::/job/step\n",
        {
            "job/step/cpu.max": "max 100000",
            "job/cpu.max": "150000 100000",
            "job/step/memory.max": "max",
            "job/memory.max": 3 * GIB,
            "job/memory.current": GIB,
        },
    ),
    # Version 1, and a container whose groups are named as the host sees them.
    (
        V1,
        {
            "cpu,cpuacct/cpu.cfs_quota_us": 150000,
            "cpu,cpuacct/cpu.cfs_period_us": 100000,
            "memory/memory.limit_in_bytes": 3 * GIB,
            "memory/memory.usage_in_bytes": GIB,
        },
    ),
    (
        V1,
        {
            "cpu/job/cpu.cfs_quota_us": 150000,
            "cpu/job/cpu.cfs_period_us": 100000,
            "cpu/cpu.cfs_quota_us": -1,
            "cpu/cpu.cfs_period_us": 100000,
            "memory/job/step/memory.limit_in_bytes": 3 * GIB,
            "memory/job/step/memory.usage_in_bytes": GIB,
        },
    ),
]


@pytest.mark.parametrize(
    ("own", "settings"), LIMITS, ids=["container", "nested", "v1", "v1 nested"]
)
def test_control_groups_limit_this_machine(
    own: str,
    settings: dict[str, str | int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    names, groups = tmp_path / "names", tmp_path / "groups"
    names.write_text(own)
    monkeypatch.setattr(allocation, "_OWN_CONTROL_GROUPS", names)
    monkeypatch.setattr(allocation, "_CONTROL_GROUPS", groups)
    free = this_machine(ComputeSpec())
    assert free.cpus == len(os.sched_getaffinity(0))
    for name, value in settings.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(f"{value}\n")
    limited = this_machine(ComputeSpec())
    assert limited.cpus == 1
    assert 0 < limited.memory_bytes <= min(free.memory_bytes, 2 * GIB)


def test_a_worker_is_given_its_backend_and_threads_and_no_secret(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    given = worker_environment(Allocation(workers=2, threads=3))
    assert given["KERAS_BACKEND"] == "jax"
    assert given["NPROC"] == given["OMP_NUM_THREADS"] == "3"
    assert given["JAX_PLATFORMS"] == "cpu"
    assert "canary" not in str(given)
    assert "JAX_PLATFORMS" not in worker_environment(Allocation(workers=1, threads=1, gpus=1))
