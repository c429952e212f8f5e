"""The devices of a worker: all GPUs that its process is given, or the CPU.

A thread drives each GPU, since XLA lets go of the interpreter while it compiles, copies and waits.
What passes from one to another goes over their own link: an array of JAX is copied from device to
device, and added there in the order that the plan fixes.

Ray's transports for arrays of devices (`ray.experimental.rdt` of 2.60: NCCL, NIXL, CUDA IPC) take
tensors of PyTorch, and keep an actor for each GPU, each of which would read, decode and factor for
itself. JAX's own processes (`jax.distributed`) have to start together and run one program in step:
if one dies, all do, and with it more than its block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax
from jax import Array
from jax.sharding import SingleDeviceSharding

from pipeline.reduction import halves, reduce_subtree

_T = TypeVar("_T")


class Devices:
    """A worker's devices, by number. Results do not depend on how many there are.

    With one, its arrays are left where JAX puts them, and all is done by the calling thread.
    """

    def __init__(self, devices: Sequence[jax.Device]) -> None:
        self._devices = tuple(devices)

    @classmethod
    def of_this_process(cls) -> Devices:
        """All GPUs that the process sees; of CPUs one, whose threads share its products."""
        found = jax.local_devices()
        return cls(found[:1] if jax.default_backend() == "cpu" else found)

    def __len__(self) -> int:
        return len(self._devices)

    @property
    def first(self) -> jax.Device:
        """Where layers are solved, and sums come together."""
        return self._devices[0]

    @property
    def several(self) -> Sequence[jax.Device]:
        """All of them where there are several; none if there is only one."""
        return self._devices if len(self) > 1 else ()

    def each(self, work: Callable[[int], _T]) -> list[_T]:
        """Call `work` with the number of each device, at the same time.

        In it JAX computes there, and puts there what comes from the host.
        """
        if len(self) == 1:
            return [work(0)]

        def on_own(number: int) -> _T:
            if number == 0:
                return work(0)  # JAX computes there anyway, with programs that others use, too
            with jax.default_device(self._devices[number]):
                return work(number)

        with ThreadPoolExecutor(len(self), thread_name_prefix="device") as pool:
            return list(pool.map(on_own, range(len(self))))

    def copied(self, arrays: Sequence[Array], number: int) -> list[Array]:
        """Arrays of one device on another."""
        return list(jax.device_put(list(arrays), self._devices[number]))

    def memory(self, number: int, kind: str) -> SingleDeviceSharding:
        """A device's own memory, "device", or what of the host's it can read, "pinned_host"."""
        return SingleDeviceSharding(self._devices[number], memory_kind=kind)

    def reduce(
        self,
        subtree: range,
        device_of: Callable[[int], int],
        leaf: Callable[[int], _T],
        merge: Callable[[_T, _T], _T],
    ) -> _T:
        """The sum of a subtree of the reduction (see `pipeline.reduction`).

        Each device adds up what it holds, as far as these are whole subtrees.

        Args:
            device_of: which device a leaf is on.
            merge: adds two sums, of which the right may be on another device, where the left is.
        """
        held = _held_whole(subtree, device_of)

        def on_own(number: int) -> dict[range, _T]:
            own = [leaves for leaves in held if device_of(leaves[0]) == number]
            return {leaves: reduce_subtree(leaves, leaf, merge) for leaves in own}

        sums = {leaves: total for found in self.each(on_own) for leaves, total in found.items()}

        def total_of(leaves: range) -> _T:
            if leaves in sums:
                return sums.pop(leaves)
            left, right = halves(leaves)
            return merge(total_of(left), total_of(right))

        return total_of(subtree)


def _held_whole(leaves: range, device_of: Callable[[int], int]) -> list[range]:
    """The largest subtrees, in order, of which all leaves are on one device."""
    if len({device_of(leaf) for leaf in leaves}) == 1:
        return [leaves]
    return [found for half in halves(leaves) for found in _held_whole(half, device_of)]
