"""What a run gets of nodes, decided without Ray."""

from __future__ import annotations

import os

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


def test_this_machine_is_what_the_process_may_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    found = this_machine(ComputeSpec())
    assert 1 <= found.cpus <= len(os.sched_getaffinity(0))
    assert found.memory_bytes > 1 << 28
    # More workers than CPUs share them.
    assert this_machine(ComputeSpec(workers=64)).cpus == 64
    settings = {
        "cpu.max": "150000 100000",
        "memory.max": str(3 * GIB),
        "memory.current": str(GIB),
    }
    monkeypatch.setattr(allocation, "_control_group", lambda name: settings.get(name, ""))
    limited = this_machine(ComputeSpec())
    assert limited.cpus == 1
    assert limited.memory_bytes <= 2 * GIB


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
