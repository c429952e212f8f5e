"""A cluster of nodes that say they have GPUs of two kinds, on a machine without any."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from pipeline.executor.protocol import Allocation, ComputeSpec, ExecutorError
from pipeline.executor.ray_cluster import allocate_on_cluster, connect
from pipeline.executor.ray_executor import RayExecutor
from pipeline.remote_planning import identity, start_worker
from tests.integration.ray_cluster import quiet_environment

pytestmark = [pytest.mark.ray, pytest.mark.exhaustive]


# In a process of its own, without JAX: nodes are forked.
_CLUSTER = """
import sys
from ray.cluster_utils import Cluster
head = {"num_cpus": 4, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=head)
for kind, gpus in (("H100", 2), ("L4", 1)):
    cluster.add_node(num_cpus=4, num_gpus=gpus, resources={f"accelerator_type:{kind}": 1})
print("cluster", cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def mixed_cluster() -> Iterator[None]:
    """Connected to a cluster of a node with two H100, one with an L4, and one of CPUs."""
    process = subprocess.Popen(
        [sys.executable, "-c", _CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=quiet_environment(),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process, pytest.MonkeyPatch.context() as patch:
        # Ray, too, may print lines.
        lines = (line.split() for line in process.stdout)
        [address] = next(words[1:] for words in lines if words[:1] == ["cluster"])
        for name, value in quiet_environment().items():
            patch.setenv(name, value)
        with connect(address):
            yield


@pytest.mark.usefixtures("mixed_cluster")
def test_workers_are_all_on_one_kind_of_gpu_which_a_mixed_cluster_asks_for() -> None:
    with pytest.raises(ExecutorError, match="round differently: 2 × H100, 1 × L4; say which"):
        allocate_on_cluster(ComputeSpec())
    found = allocate_on_cluster(ComputeSpec(accelerator="H100"))
    assert (found.workers, found.threads, found.gpus, found.accelerator) == (1, 4, 2, "H100")
    apart = allocate_on_cluster(ComputeSpec(accelerator="H100", gpus_per_worker=1))
    assert (apart.workers, apart.threads, apart.gpus) == (2, 2, 1)
    on_cpus = allocate_on_cluster(ComputeSpec(device="cpu", threads=2))
    assert (on_cpus.workers, on_cpus.gpus) == (6, 0)


@pytest.mark.usefixtures("mixed_cluster")
def test_a_worker_that_cannot_use_its_gpu_ends_the_run_at_once(tmp_path: Path) -> None:
    import ray

    allocation = Allocation(workers=1, threads=1, gpus=1, accelerator="L4")
    executor = RayExecutor(allocation, partial(start_worker, "/nowhere", str(tmp_path / "run")))
    try:
        with pytest.raises(
            ExecutorError, match=r"a GPU is booked .* or use --device cpu"
        ) as raised:
            executor.run(identity, "/nowhere", 1)
        assert str(raised.value).startswith("a worker cannot start: ")
        assert "\n" not in str(raised.value)
    finally:
        for actor in executor._actors:
            ray.kill(actor)
