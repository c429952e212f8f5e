"""What the CPUs at hand do, measured in about a second, for the cost model.

In the process that plans, which has the environment of workers and as many threads.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pipeline.executor.allocation import available_memory_bytes
from pipeline.planning.machines import Machine

_PRODUCT_SECONDS = 0.6
_SECONDS = 0.1
"""That each measurement may take, once its program is compiled."""
_SIZE = 1024
_FLOPS_PER_BYTE = 22
"""What products do while a pass over numbers in the cache moves a byte: as where the passes of
`pipeline.planning.work` were counted. Timed alone, threads that wake up for a pass are most of it,
and on a busy machine all of it."""
_COPIED = 8 << 20
_HASHED_BYTES = 8 << 20
# Not measured: files come from a disk that others read too, and sums of workers go through shared
# memory.
_STORAGE_BYTES_PER_SECOND = 1e9
_NETWORK_BYTES_PER_SECOND = 1e9
_STEP_SECONDS = 1e-6


def measure_machine(threads: int) -> Machine:
    """The machine that this process runs on, as it is now, with whatever else it does.

    Args:
        threads: that this process computes with.
    """
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(_SIZE, _SIZE)), jnp.float32)
    buffer = np.zeros(_COPIED, np.float32)
    hashed = bytes(_HASHED_BYTES)
    product = _mean_seconds(lambda: _product(matrix), _PRODUCT_SECONDS)
    copied = _mean_seconds(buffer.copy, _SECONDS)
    digested = _mean_seconds(lambda: hashlib.sha256(hashed).digest(), _SECONDS)
    flops = 2 * _SIZE**3 / product
    return Machine(
        name="this machine",
        device="cpu",
        float32_flops=flops,
        bfloat16_flops=flops,
        float32_achievable=1.0,
        bfloat16_achievable=1.0,
        memory_bytes=float(max(available_memory_bytes(), 1)),
        memory_bytes_per_second=flops / _FLOPS_PER_BYTE,
        memory_achievable=1.0,
        transfer_bytes_per_second=2 * buffer.nbytes / copied,
        transfer_achievable=1.0,
        step_seconds=_STEP_SECONDS,
        host_threads=threads,
        host_bytes_per_second=2 * buffer.nbytes / copied,
        host_hash_bytes_per_second=_HASHED_BYTES / digested,
        storage_bytes_per_second=_STORAGE_BYTES_PER_SECOND,
        network_bytes_per_second=_NETWORK_BYTES_PER_SECOND,
        workers_per_node=1_000_000,
        source=f"measured now, on {threads} thread(s); storage and network assumed",
    )


def _mean_seconds(work: Callable[[], Any], at_least: float) -> float:
    """The mean, not the least: others on the machine take their part of a run, too."""
    jax.block_until_ready(work())
    start, number = time.perf_counter(), 0
    while time.perf_counter() - start < at_least:
        jax.block_until_ready(work())
        number += 1
    return (time.perf_counter() - start) / number


@jax.jit
def _product(matrix: jax.Array) -> jax.Array:
    return jnp.matmul(matrix, matrix, precision=lax.Precision.HIGHEST)
