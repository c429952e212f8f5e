"""What a run gets of nodes, decided without Ray."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.executor import allocation
from pipeline.executor.allocation import NodeResources, allocate, this_machine
from pipeline.executor.protocol import ComputeSpec, ExecutorError, NodeRoom

GIB = 1 << 30
EIGHT = NodeResources(cpus=8, memory_bytes=16 * GIB)
TWO = NodeResources(cpus=2, memory_bytes=4 * GIB)
TWO_GPUS = NodeResources(cpus=8, gpus=2, memory_bytes=16 * GIB)
EIGHT_GPUS = NodeResources(cpus=64, gpus=8, memory_bytes=16 * GIB)
ONE_GPU = NodeResources(cpus=8, gpus=1, memory_bytes=16 * GIB)
H100 = NodeResources(cpus=8, gpus=1, memory_bytes=16 * GIB, accelerator="H100")
L4 = NodeResources(cpus=4, gpus=2, memory_bytes=16 * GIB, accelerator="L4")


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
        # One worker per node, with all of its GPUs, unless others are asked for.
        ([TWO_GPUS], ComputeSpec(), (1, 8, 2)),
        ([TWO_GPUS, TWO_GPUS], ComputeSpec(), (2, 8, 2)),
        ([TWO_GPUS, EIGHT], ComputeSpec(workers=1, device="gpu"), (1, 8, 2)),
        ([TWO_GPUS], ComputeSpec(workers=2), (2, 4, 1)),
        ([TWO_GPUS], ComputeSpec(gpus_per_worker=1), (2, 4, 1)),
        ([EIGHT_GPUS], ComputeSpec(workers=2), (2, 32, 4)),
        ([EIGHT_GPUS], ComputeSpec(workers=3), (3, 21, 2)),
        ([EIGHT_GPUS, EIGHT_GPUS], ComputeSpec(workers=4), (4, 32, 4)),
        ([EIGHT_GPUS], ComputeSpec(gpus_per_worker=3), (2, 32, 3)),
        ([EIGHT_GPUS], ComputeSpec(workers=1, gpus_per_worker=2), (1, 64, 2)),
        ([TWO_GPUS], ComputeSpec(device="cpu"), (1, 8, 0)),
        # A worker's threads have to fit a node with a GPU: others lend it none.
        ([ONE_GPU] * 4 + [EIGHT] * 8, ComputeSpec(), (4, 8, 1)),
        ([TWO_GPUS, ONE_GPU], ComputeSpec(), (3, 4, 1)),
        # Nodes with other numbers of GPUs than each other give one to each worker.
        ([TWO_GPUS, ONE_GPU], ComputeSpec(gpus_per_worker=2), (1, 8, 2)),
        ([TWO_GPUS, EIGHT], ComputeSpec(threads=8), (1, 8, 2)),
        ([NodeResources(cpus=1, gpus=4), TWO], ComputeSpec(), (1, 1, 4)),
        ([NodeResources(cpus=0, gpus=1), ONE_GPU], ComputeSpec(), (1, 8, 1)),
        # Nodes without CPUs for a worker do not decide how many GPUs each gets.
        ([NodeResources(cpus=0, gpus=8), EIGHT_GPUS], ComputeSpec(workers=2), (2, 32, 4)),
        ([NodeResources(cpus=0, gpus=8), TWO_GPUS], ComputeSpec(), (1, 8, 2)),
        ([NodeResources(cpus=1, gpus=8), EIGHT_GPUS], ComputeSpec(workers=2), (2, 1, 8)),
        ([NodeResources(cpus=1, gpus=8), EIGHT_GPUS], ComputeSpec(workers=2, threads=2), (2, 2, 4)),
        ([NodeResources(cpus=1, gpus=8)] * 2, ComputeSpec(workers=2), (2, 1, 8)),
        ([H100, H100, L4], ComputeSpec(accelerator="H100"), (2, 8, 1)),
    ],
)
def test_workers_threads_and_gpus(
    nodes: list[NodeResources], spec: ComputeSpec, expected: tuple[int, int, int]
) -> None:
    found = allocate(spec, nodes)
    assert (found.workers, found.threads, found.gpus) == expected


def test_runs_without_calibration_have_a_worker_for_each_gpu_unless_told_otherwise() -> None:
    assert allocate(ComputeSpec().with_one_gpu_each(), [TWO_GPUS]).workers == 2
    assert allocate(ComputeSpec().with_one_gpu_each(), [EIGHT]).gpus == 0
    for spec in (ComputeSpec(gpus_per_worker=2), ComputeSpec(device="cpu")):
        assert spec.with_one_gpu_each() == spec


@pytest.mark.parametrize(
    ("nodes", "spec", "message"),
    [
        ([EIGHT], ComputeSpec(workers=9, threads=1), r"9 workers of 1 threads do not fit.*8 CPUs"),
        ([EIGHT], ComputeSpec(device="gpu"), "no GPU; use --device cpu"),
        ([TWO_GPUS], ComputeSpec(workers=3), "3 workers need as many GPUs; the cluster has 2"),
        (
            [TWO_GPUS],
            ComputeSpec(gpus_per_worker=3),
            "--gpus-per-worker 3: no node of the cluster has so many, but 2 at most",
        ),
        (
            [TWO_GPUS, ONE_GPU],
            ComputeSpec(workers=2, gpus_per_worker=2),
            "2 workers need 2 GPUs of one node each; the cluster has 3, enough for 1",
        ),
        (
            [EIGHT],
            ComputeSpec(gpus_per_worker=2),
            "--gpus-per-worker, .* is 2, and the cluster has no GPU; leave it out",
        ),
        (
            [EIGHT],
            ComputeSpec(accelerator="H100"),
            "--accelerator, .* is H100, and the cluster has no GPU; leave it out",
        ),
        ([NodeResources(cpus=0)], ComputeSpec(), "no CPU for workers"),
        (
            [NodeResources(cpus=0, gpus=1), EIGHT],
            ComputeSpec(),
            "nodes with GPUs have no CPU for workers",
        ),
        (
            [TWO_GPUS, EIGHT],
            ComputeSpec(workers=2, threads=8),
            r"2 workers of 8 threads do not fit.*8 CPUs beside GPUs \(room for 1\)",
        ),
        (
            [L4, H100, H100],
            ComputeSpec(),
            r"several kinds, which round differently: 2 × H100, 2 × L4; say .*--accelerator H100",
        ),
        ([L4, ONE_GPU], ComputeSpec(), r"1 × of an unknown kind, 2 × L4; .*--accelerator L4"),
        (
            [L4],
            ComputeSpec(accelerator="H100"),
            "--accelerator H100: the cluster has no such GPU, but 2 × L4",
        ),
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
    assert with_gpu.nodes == (NodeRoom(workers=1, memory_bytes=16 * GIB),)


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


def test_the_kind_of_gpu_is_part_of_what_a_run_gets() -> None:
    assert allocate(ComputeSpec(device="gpu"), [H100, EIGHT]).accelerator == "H100"
    assert allocate(ComputeSpec(accelerator="L4"), [H100, L4]).to_dict() == {
        "workers": 1,
        "threads": 4,
        "gpus": 2,
        "accelerator": "L4",
    }
    assert allocate(ComputeSpec(), [EIGHT]).to_dict() == {"workers": 1, "threads": 8, "gpus": 0}


def test_a_kind_of_gpu_for_workers_on_cpus_is_refused() -> None:
    with pytest.raises(ExecutorError, match="accelerator H100 is a kind of GPU"):
        ComputeSpec(device="cpu", accelerator="H100")
