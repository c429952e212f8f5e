"""A run without room is refused, with a remedy that fits."""

from __future__ import annotations

import dataclasses

import pytest

from jobs.room import check_device_memory, check_memory, evaluation_pass, place_activations
from pipeline.evaluation.batches import TOKENS_PER_PASS
from pipeline.executor.protocol import ActivationPlace, DeviceMemory, ExecutorError, NodeRoom
from pipeline.planning.estimates import Estimate, estimate
from pipeline.planning.evaluation_costs import EvaluationMemory
from tests.pipeline.tiny_runs import planned

GIB = 1 << 30


def needing(worker_bytes: int) -> Estimate:
    return dataclasses.replace(estimate(planned("gptq").plan, 1), worker_bytes=worker_bytes)


def rooms(*nodes: tuple[int, int]) -> list[NodeRoom]:
    return [NodeRoom(workers=workers, memory_bytes=memory) for workers, memory in nodes]


def test_workers_that_fit_are_let_through() -> None:
    check_memory(needing(2 * GIB), rooms((2, 4 * GIB), (1, 2 * GIB)))
    check_memory(needing(2 * GIB), [])


@pytest.mark.parametrize(
    ("nodes", "remedy"),
    [
        (rooms((1, 8 * GIB), (3, 5 * GIB)), "use --workers 2, or nodes with more memory"),
        (rooms((1, 1 * GIB)), "lower num_samples, or use nodes with more memory"),
    ],
)
def test_the_tightest_node_decides_and_the_remedy_fits(nodes: list[NodeRoom], remedy: str) -> None:
    with pytest.raises(ExecutorError, match=r"needs about 2\.0 GiB") as raised:
        check_memory(needing(2 * GIB), nodes)
    assert remedy in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_gpu_that_is_too_small_is_named() -> None:
    given = estimate(planned("gptq").plan, 1)
    costs = dataclasses.replace(given, device_bytes=30 * GIB, device_held_bytes=10 * GIB)
    large, small = (
        DeviceMemory(node=f"node-{size}", kind="NVIDIA H100", num_bytes=size * GIB)
        for size in (72, 24)
    )
    unknown = DeviceMemory(node="node-3", kind="cpu", num_bytes=None)
    check_device_memory(costs, [large, unknown])
    with pytest.raises(
        ExecutorError,
        match=r"needs about 30\.0 GiB, and on node-24 it has 24\.0 GiB of its NVIDIA H100; use "
        r"more --workers.*lower num_samples",
    ):
        check_device_memory(costs, [large, small])
    # More workers would not help.
    scores = dataclasses.replace(costs, micro_batch_bytes=16 * GIB)
    with pytest.raises(ExecutorError, match=r"16\.0 GiB of it for a single.*lower sequence_length"):
        check_device_memory(scores, [large, small])


@pytest.mark.parametrize("place", ["device", "host"])
def test_what_windows_cannot_mend_is_not_blamed_on_them(place: ActivationPlace) -> None:
    """As where a block's weights and Hessians alone are too much, with activations anywhere."""
    given = estimate(planned("gptq").plan, 1)
    costs = dataclasses.replace(given, device_bytes=30 * GIB, held_bytes=1 * GIB, activations=place)
    small = DeviceMemory(node="node", kind="NVIDIA L4", num_bytes=24 * GIB)
    with pytest.raises(ExecutorError, match="exclude the widest layers") as raised:
        check_device_memory(costs, [small])
    for useless in ("--workers", "num_samples", "sequence_length"):
        assert useless not in str(raised.value)


def test_activations_wait_on_the_devices_if_all_have_room_for_them() -> None:
    plan = planned("gptq").plan
    on_gpu = dataclasses.replace(plan, machine={"platform": "gpu", "device": "NVIDIA H100"})
    costs = estimate(on_gpu, 1)
    assert costs.activations == "device"

    def gpu(num_bytes: int | None) -> DeviceMemory:
        return DeviceMemory(node="node", kind="NVIDIA H100", num_bytes=num_bytes)

    enough, little = gpu(costs.device_bytes), gpu(costs.device_bytes - 1)
    for devices in ([], [enough], [enough, gpu(None)]):
        assert place_activations(costs, devices) == costs
    beside = place_activations(costs, [enough, little])
    assert beside.activations == "host"
    # They count where they are, and so no longer for the device.
    assert beside.device_bytes == costs.device_bytes - costs.held_bytes
    assert beside.worker_bytes == costs.worker_bytes + costs.held_bytes
    check_device_memory(beside, [enough, little])
    with pytest.raises(ExecutorError, match="more memory") as raised:
        check_memory(beside, rooms((1, costs.worker_bytes)))
    assert "\n" not in str(raised.value)
    # What does not fit even so is refused for what it needs then.
    with pytest.raises(ExecutorError, match="wait in host memory already; lower sequence_length"):
        check_device_memory(beside, [gpu(beside.device_bytes - 1)])
    uncalibrated = estimate(dataclasses.replace(on_gpu, tokens=None), 1)
    assert place_activations(uncalibrated, [gpu(1)]) == uncalibrated


def test_an_evaluation_takes_fewer_windows_at_a_time_or_is_refused() -> None:
    needed = EvaluationMemory(
        fixed_bytes=8 * GIB,
        logits_bytes=4 * GIB,
        longest=8192,
        batch_tokens=8192,
        token_bytes=GIB // 8192,
    )

    def gpu(num_bytes: int | None) -> DeviceMemory:
        return DeviceMemory(node="node-7", kind="NVIDIA L4", num_bytes=num_bytes)

    assert evaluation_pass(needed, [gpu(None), gpu(80 * GIB)]) == TOKENS_PER_PASS
    assert evaluation_pass(needed, [gpu(80 * GIB), gpu(10 * GIB)]) == 2 * 8192
    with pytest.raises(ExecutorError) as raised:
        evaluation_pass(needed, [gpu(80 * GIB), gpu(8 * GIB)])
    told = str(raised.value)
    assert "needs about 9.0 GiB, 4.0 GiB of it for the logits of a window of 8192 tokens" in told
    assert "on node-7 it has 8.0 GiB of its NVIDIA L4; leave the evaluation out" in told
    assert "\n" not in told
