"""Where a worker's activations wait between two stages: on its device, or in its host's memory.

Which of the two is planned from the memory that devices have (see `pipeline.planning.estimates`).
Results do not depend on it: the same arrays come back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType

import jax
from jax import Array

from pipeline.executor.protocol import ActivationPlace
from pipeline.worker.devices import Devices


class ActivationMemory:
    """Keeps what waits of one device, and brings it back when its windows go on.

    Attributes:
        device: its number.
    """

    def __init__(self, place: ActivationPlace, devices: Devices, device: int = 0) -> None:
        self._on_device = place == "device"
        self._memory, self.device = partial(devices.memory, device), device
        self._under_way: Sequence[Array] = ()

    def keep(
        self, arrays: Sequence[Array], kept: Mapping[int, Array] = MappingProxyType({})
    ) -> tuple[Array, ...]:
        """Put away what the device has computed.

        In host memory it is pinned, so that the device can copy it while it computes. No more than
        one micro-batch is copied while the next one is computed, or the device would fill up.

        Args:
            kept: by the `id` of what was fetched, where it is kept already.
        """
        if self._on_device:
            return tuple(arrays)
        new = [array for array in arrays if id(array) not in kept]
        sent: list[Array] = jax.device_put(new, self._memory("pinned_host"))
        jax.block_until_ready(self._under_way)
        self._under_way = sent
        known = {**kept, **dict(zip(map(id, new), sent, strict=True))}
        return tuple(known[id(array)] for array in arrays)

    def fetch(self, arrays: Sequence[Array]) -> tuple[Array, ...]:
        """Bring back what was put away, to be computed with."""
        if self._on_device:
            return tuple(arrays)
        return tuple(jax.device_put(list(arrays), self._memory("device")))
