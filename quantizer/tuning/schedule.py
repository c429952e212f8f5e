"""Which micro-batches a block is trained on, in which order, and which are held back to judge by.

All of it follows from their number and a seed, so that it is the same on every machine and under
every version of NumPy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Micro-batches by their number.

    Attributes:
        steps: those of each step, in the order in which their gradients are added.
        held_back: those that no step has.
    """

    steps: tuple[tuple[int, ...], ...]
    held_back: tuple[int, ...]

    @property
    def used(self) -> frozenset[int]:
        """All that it names."""
        return frozenset(self.held_back).union(*self.steps)


def make_schedule(
    num_batches: int,
    *,
    held_back: tuple[int, ...],
    steps: int,
    batch: int,
    seed: int,
    block: int,
) -> Schedule:
    """The schedule of one block: what is not held back comes in rounds, each in its own order.

    Args:
        num_batches: of micro-batches; held_back: some of them, and not all.
        batch: micro-batches of a step.
    """
    assert 0 < len(held_back) < num_batches, "one to train on and one to judge by"
    rest = [number for number in range(num_batches) if number not in held_back]
    drawn: list[int] = []
    # Raw bits are the same in every version of NumPy; what Generator makes of them is not.
    bits = np.random.PCG64([seed, block])
    while len(drawn) < steps * batch:
        order = np.argsort(bits.random_raw(len(rest)), kind="stable")
        drawn += [rest[place] for place in order]
    return Schedule(
        steps=tuple(tuple(drawn[a * batch : (a + 1) * batch]) for a in range(steps)),
        held_back=held_back,
    )
