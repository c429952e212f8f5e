"""A device's memory: how much a worker may use, and what to do when it is not enough."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from pipeline.executor.protocol import DeviceMemory, ExecutorError

_EXHAUSTED = "RESOURCE_EXHAUSTED"
"""How XLA's message begins when an allocation fails, on every device."""


def device_memory() -> DeviceMemory:
    """What XLA gives this process of its device, where it says so: on GPUs, not on CPUs."""
    device = jax.devices()[0]
    statistics = device.memory_stats() or {}
    return DeviceMemory(
        node=platform.node(),
        kind=str(device.device_kind),
        num_bytes=statistics.get("bytes_limit"),
        peak_bytes=statistics.get("peak_bytes_in_use"),
    )


@contextmanager
def device_errors() -> Iterator[None]:
    """Raise a lack of device memory as an error that says what to do; also a decorator.

    Raises:
        ExecutorError: the block could not get the memory that it needs.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        if not reason.startswith(_EXHAUSTED):
            raise
        reason = reason.removeprefix(_EXHAUSTED).lstrip(": ").rstrip(".")[:200]
        raise ExecutorError(
            f"{platform.node()}: too little memory on its device, {jax.devices()[0].device_kind} "
            f"({reason}); resume with more --workers, so that each holds fewer windows, or start a "
            "new run with a lower num_samples or sequence_length"
        ) from error
