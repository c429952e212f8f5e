"""Whether a run has room: in the memory of its nodes, and of its workers' GPUs."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.quantities import size
from pipeline.evaluation.batches import TOKENS_PER_PASS
from pipeline.executor.protocol import DeviceMemory, ExecutorError, NodeRoom
from pipeline.planning.estimates import Estimate
from pipeline.planning.evaluation_costs import EvaluationMemory


def check_memory(costs: Estimate, nodes: Sequence[NodeRoom]) -> None:
    """Refuse a run whose workers would not fit into the memory of their nodes."""
    for node in nodes:
        if node.workers * costs.worker_bytes > node.memory_bytes:
            fitting = node.memory_bytes // costs.worker_bytes
            remedy = f"use --workers {fitting}, or" if fitting else "lower num_samples, or use"
            raise ExecutorError(
                f"too little memory: a worker needs about {size(costs.worker_bytes)}, and a node "
                f"that may run {node.workers} of them has {size(node.memory_bytes)}; {remedy} "
                "nodes with more memory"
            )


def place_activations(costs: Estimate, devices: Sequence[DeviceMemory]) -> Estimate:
    """Have activations wait in host memory if any worker's device has no room for them.

    It is one place for all workers, and results do not depend on it.
    """
    known = [device.num_bytes for device in devices if device.num_bytes is not None]
    has_room = not known or costs.device_bytes <= min(known)
    return costs if has_room or not costs.held_bytes else costs.beside_devices()


def check_device_memory(costs: Estimate, devices: Sequence[DeviceMemory]) -> None:
    """Refuse a run whose workers would not fit into the memory of their devices."""
    for device in devices:
        if device.num_bytes is not None and costs.device_bytes > device.num_bytes:
            remedy = (
                "use more --workers or GPUs, so that each has fewer windows, lower num_samples,"
            )
            if costs.activations == "host":
                remedy = "activations wait in host memory already; lower sequence_length,"
            if 2 * costs.micro_batch_bytes > device.num_bytes:
                remedy = (
                    f"{size(costs.micro_batch_bytes)} of it for a single micro-batch: lower "
                    "sequence_length, compute in bfloat16 (--dtype), for which most models need "
                    "no attention scores,"
                )
            if _without_windows(costs) > device.num_bytes:
                remedy = (
                    f"{size(_without_windows(costs))} of it whatever the windows, for programs, "
                    "the weights of a part and to solve its widest layer: exclude the widest "
                    "layers, give them a scheme without calibration, such as int4,"
                )
            raise ExecutorError(
                f"too little GPU memory: a worker needs about {size(costs.device_bytes)}, and on "
                f"{device.node} it has {size(device.num_bytes)} of its {device.kind}; {remedy} or "
                "use GPUs with more memory"
            )


def evaluation_pass(needed: EvaluationMemory, devices: Sequence[DeviceMemory]) -> int:
    """How many tokens may pass the blocks together, on any of the workers' devices.

    Raises:
        ExecutorError: not even one batch fits one of them.
    """
    fitting = TOKENS_PER_PASS
    for device in devices:
        if device.num_bytes is None:
            continue
        if needed.least_bytes > device.num_bytes:
            raise ExecutorError(
                f"too little GPU memory to evaluate: a worker needs about "
                f"{size(needed.least_bytes)}, {size(needed.logits_bytes)} of it for the logits of "
                f"a window of {needed.longest} tokens, and on {device.node} it has "
                f"{size(device.num_bytes)} of its {device.kind}; leave the evaluation out and run "
                "quantfleet evaluate --device cpu later, lower sequence_length, or use GPUs with "
                "more memory"
            )
        fitting = min(fitting, needed.tokens_per_pass(device.num_bytes))
    return fitting


def _without_windows(costs: Estimate) -> int:
    """Of a GPU's memory, what neither fewer nor shorter windows would lower much."""
    on_device = costs.device_held_bytes if costs.activations == "device" else 0
    return costs.device_bytes - costs.micro_batch_bytes - on_device
