"""How many windows pass a block together on a GPU: fewer where its memory holds no more.

A plan names them, since products round by their shapes. They follow from the kind of GPU and the
model alone, never from the number of workers, on which no byte of a result depends.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.calibration.windows import shard_bounds
from pipeline.plan import Plan, TokensPlan, micro_batches
from pipeline.planning.estimates import estimate


def fitting_micro_batch(plan: Plan, device_bytes: int | None) -> int | None:
    """The most windows of a micro-batch with which a block fits a GPU; None for those planned.

    The planned number or a half of it, a quarter, and so on. All else is as small as it can be:
    activations in host memory, and a shard for each worker. One window is the least, also if a
    block does not fit with it: then the run is refused.

    Args:
        device_bytes: that a worker may use of its GPU; None if it is not known.
    """
    tokens = plan.tokens
    if tokens is None or device_bytes is None or plan.device == "cpu":
        return None
    number = tokens.micro_batch
    while number > 1:
        smaller = replace(plan, tokens=_with_micro_batch(tokens, number))
        # A worker with two GPUs has one's sums arrive at the other.
        needed = estimate(smaller, len(tokens.shards), gpus=2).beside_devices()
        if needed.device_bytes <= device_bytes:
            break
        number //= 2
    return number if number < tokens.micro_batch else None


def in_fitting_micro_batches(plan: Plan, device_bytes: int | None) -> Plan:
    """The plan as it would be made on such a GPU, as far as costs go.

    Args:
        device_bytes: as in `fitting_micro_batch`.
    """
    number, tokens = fitting_micro_batch(plan, device_bytes), plan.tokens
    if number is None or tokens is None:
        return plan
    _, shard = micro_batches(tokens.num_samples, tokens.sequence_length, plan.device, number)
    smaller = _with_micro_batch(tokens, number)
    return replace(plan, tokens=replace(smaller, shards=shard_bounds(tokens.num_samples, shard)))


def _with_micro_batch(tokens: TokensPlan, number: int) -> TokensPlan:
    # The largest array is one of what the block computes for every window.
    largest = tokens.largest_array_bytes * number // tokens.micro_batch
    return replace(tokens, micro_batch=number, largest_array_bytes=largest)
