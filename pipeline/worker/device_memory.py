"""Devices' memory: how much a worker may use, and what to do when it is not enough."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from pipeline.executor.protocol import DeviceMemory, ExecutorError

_EXHAUSTED = "RESOURCE_EXHAUSTED"
"""How XLA's message begins when an allocation fails, on every device."""


def device_memory() -> DeviceMemory:
    """What XLA gives this process of each of its devices: on GPUs, since CPUs do not say.

    The least that it may use of any, and the most that it has used of any.
    """
    devices = jax.local_devices()
    statistics = [device.memory_stats() or {} for device in devices]
    return DeviceMemory(
        node=platform.node(),
        kind=str(devices[0].device_kind),
        num_bytes=min((x["bytes_limit"] for x in statistics if "bytes_limit" in x), default=None),
        peak_bytes=max(
            (x["peak_bytes_in_use"] for x in statistics if "peak_bytes_in_use" in x), default=None
        ),
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
