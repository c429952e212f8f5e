"""The sums over inputs that a worker holds on its devices, until their layers are solved.

A sum is a function of what it covers (see `HeldSum`), so that it does not matter which of two equal
calls made it, nor when.
"""

from __future__ import annotations

import dataclasses

from pipeline.executor.protocol import WorkerLostError
from pipeline.run.worker_api import HeldSum, InputSum
from pipeline.worker.statistics import merged


class LostSumError(WorkerLostError):
    """A restarted worker was asked for a sum that it has not captured."""


class HeldSums:
    """The sums that a worker holds, by what they cover."""

    def __init__(self) -> None:
        self._held: dict[HeldSum, InputSum] = {}

    def begin(self, due: HeldSum) -> None:
        """Forget the sums before one: their layers are solved when it is to be made.

        Later ones stay, since this one may be made late and for the second time.
        """
        self._held = {x: total for x, total in self._held.items() if x.place >= due.place}

    def begin_block(self, block: int) -> None:
        """Forget the sums of blocks more than one before this one, where they are only sent.

        Those of the block before may still be on their way to its commit, which ends before the
        commit of this one begins.
        """
        self._held = {x: total for x, total in self._held.items() if x.block >= block - 1}

    def put(self, held: HeldSum, total: InputSum) -> HeldSum:
        """Hold a sum; returns its name."""
        self._held[held] = total
        return held

    def get(self, held: HeldSum) -> InputSum:
        """A sum that is held.

        Raises:
            LostSumError: it is not.
        """
        total = self._held.get(held)
        if total is None:
            raise LostSumError(f"{held} is needed, but not held here")
        return total

    def merge(self, left: HeldSum, right: HeldSum, sent: InputSum | None) -> HeldSum:
        """Hold the sum over both in their place; returns its name.

        Args:
            sent: the right one, if another worker holds it.

        Raises:
            LostSumError: one of them is not held, nor any sum that it has become part of.
        """
        both = dataclasses.replace(left, leaves=range(left.leaves.start, right.leaves.stop))
        if any(both.is_part_of(held) for held in self._held):
            return both  # done before, by a call that is now repeated
        self.get(left)
        if sent is None:
            self.get(right)
            sent = self._held.pop(right)
        return self.put(both, merged(self._held.pop(left), sent))

    def clear(self) -> None:
        """Forget all of them."""
        self._held.clear()
