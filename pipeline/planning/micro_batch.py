"""How many windows pass a block together: on a GPU fewer where its memory holds no more.

A plan names them, since products round by their shapes. They follow from the kind of GPU and the
model alone, never from the number of workers, on which no byte of a result depends.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.calibration.windows import shard_bounds
from pipeline.plan import Plan
from pipeline.planning.estimates import estimate
from pipeline.tokens_plan import TokensPlan

_CPU_MICRO_BATCH_TOKENS = 512
_SHARD_TOKENS = 2048
_MAX_SHARDS = 32


def micro_batches(
    num_samples: int, sequence_length: int, platform: str, at_most: int | None = None
) -> tuple[int, int]:
    """The windows of a micro-batch, and the windows of a shard, which holds whole micro-batches.

    A CPU's caches hold the attention scores of about 512 tokens; an accelerator needs more. A shard
    has 2,048 tokens, or more where there would be more than 32 shards.

    Args:
        at_most: windows of a micro-batch, where memory holds no more.
    """
    tokens = _CPU_MICRO_BATCH_TOKENS if platform == "cpu" else _SHARD_TOKENS
    micro_batch = min(num_samples, max(1, tokens // sequence_length), at_most or num_samples)
    shard = min(num_samples, max(1, _SHARD_TOKENS // sequence_length))
    shard = micro_batch * max(1, shard // micro_batch)
    return micro_batch, shard * -(-num_samples // (shard * _MAX_SHARDS))


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
