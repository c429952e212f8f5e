import dataclasses
from typing import Any

import pytest

from jobs.execute import Compute, check_identity
from pipeline.errors import PipelineError
from pipeline.executor.protocol import Allocation, DeviceMemory
from pipeline.planning.estimates import estimate
from pipeline.remote_planning import Identity
from tests.pipeline.tiny_runs import planned

GIB = 1 << 30


class Measured:
    """Stands for workers that say what they have used of their GPUs."""

    num_processes = 2

    def run_each(self, function: object, arguments: list[tuple[()]]) -> list[DeviceMemory]:
        assert len(arguments) == self.num_processes
        return [
            DeviceMemory(node="n", kind="NVIDIA H100", num_bytes=9 * GIB, peak_bytes=peak * GIB)
            for peak in (3, 5)
        ]


def test_a_run_on_gpus_says_what_it_used_of_them() -> None:
    def start() -> Any:
        return Measured()

    assert Compute(Allocation(workers=2, threads=1, gpus=1), start).device_peak_bytes() == 5 * GIB
    assert Compute(Allocation(workers=2, threads=1), start).device_peak_bytes() is None


def test_fewer_workers_may_have_to_keep_activations_beside_their_gpus() -> None:
    plan = planned("gptq").plan
    on_gpu = dataclasses.replace(plan, machine={"platform": "gpu", "device": "NVIDIA H100"})
    gpu = DeviceMemory(node="n", kind="NVIDIA H100", num_bytes=estimate(on_gpu, 2).device_bytes)

    class Workers:
        num_processes = 2

        def run_each(self, function: object, arguments: object) -> list[DeviceMemory]:
            return [gpu] * 2

    def start() -> Any:
        return Workers()

    compute = Compute(Allocation(workers=2, threads=1, gpus=1), start)
    assert [compute.place(on_gpu, workers) for workers in (2, 1)] == ["device", "host"]
    on_cpu = Compute(Allocation(workers=2, threads=1), start)
    assert on_cpu.place(plan, 1) == "device"


def here(**other: object) -> Identity:
    plan = planned("gptq").plan
    same = Identity(
        source_files_sha256=plan.source_files_sha256,
        machine=plan.machine,
        versions=plan.versions,
    )
    return dataclasses.replace(same, **other)  # type: ignore[arg-type]


def test_going_on_needs_the_same_source_machine_and_packages() -> None:
    plan = planned("gptq").plan
    check_identity(plan, here(), "preset", finished=False)
    with pytest.raises(PipelineError, match="preset: the source changed"):
        check_identity(plan, here(source_files_sha256="0" * 64), "preset", finished=True)
    with pytest.raises(PipelineError, match=r"threads 9, planned 2"):
        check_identity(
            plan, here(machine={**plan.machine, "threads": "9"}), "preset", finished=False
        )
    with pytest.raises(PipelineError, match=r"jax None, planned"):
        check_identity(plan, here(versions={}), "preset", finished=False)


def test_judging_a_finished_result_needs_the_same_source_alone() -> None:
    check_identity(planned("gptq").plan, here(versions={}), "preset", finished=True)
