"""Which option each block gets, so that a model costs least within a number of bytes.

The costs of blocks are added up: what two blocks cost together is taken to be what either costs
alone. That is exact to first order in small errors, and an estimate otherwise, so that a choice has
to be measured before it is believed.

A dynamic programme goes through the blocks from the last to the first. For every budget it holds
the least that the blocks from there on cost. Sizes are counted from each block's smallest option,
in units: of one byte where that gives no more than `RESOLUTION` of them, and rounded up otherwise,
so that a choice never exceeds its budget, and leaves at most a unit a block of it unused.

Of equal costs it takes the fewest units; of equal sizes too, the first block that differs takes the
option that is named first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESOLUTION = 1 << 17
"""Units between the smallest and the largest of all choices, at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One way to store a block.

    Attributes:
        cost: what it alone costs the model; 0 or more.
    """

    size_bytes: int
    cost: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """An option for every block.

    Attributes:
        picked: the number of each block's option.
        size_bytes, cost: of all blocks.
    """

    picked: tuple[int, ...]
    size_bytes: int
    cost: float


class Choices:
    """The best choices within any number of bytes."""

    def __init__(self, options: Sequence[Sequence[Option]]) -> None:
        """Args: options: of each block, one at least."""
        self._options = options
        self.least_bytes = sum(min(one.size_bytes for one in block) for block in options)
        self.most_bytes = sum(max(one.size_bytes for one in block) for block in options)
        self._unit = max(1, -(-(self.most_bytes - self.least_bytes) // RESOLUTION))
        self._units = [
            [-(-(one.size_bytes - min(o.size_bytes for o in block)) // self._unit) for one in block]
            for block in options
        ]
        self._picks = self._solve(sum(max(units) for units in self._units))

    def _solve(self, most_units: int) -> list[NDArray[np.uint8]]:
        """For each block and budget in units [0 … most_units], its option."""
        costs, used = np.zeros(most_units + 1), np.zeros(most_units + 1, np.int64)
        picks: list[NDArray[np.uint8]] = []
        for block, units in zip(reversed(self._options), reversed(self._units), strict=True):
            best = np.full(most_units + 1, np.inf)
            best_used = np.zeros(most_units + 1, np.int64)
            pick = np.zeros(most_units + 1, np.uint8)
            for number, (option, needed) in enumerate(zip(block, units, strict=True)):
                # With the budget that it leaves to later blocks.
                rest = slice(0, most_units + 1 - needed)
                cost, spent = option.cost + costs[rest], needed + used[rest]
                there = slice(needed, None)
                equal = (cost == best[there]) & (spent < best_used[there])
                better = (cost < best[there]) | equal
                best[there][better] = cost[better]
                best_used[there][better] = spent[better]
                pick[there][better] = number
            costs, used = best, best_used
            picks.append(pick)
        return picks[::-1]

    def within(self, most_bytes: int) -> Choice | None:
        """The choice of least cost within a number of bytes; None if even the smallest has more."""
        if most_bytes < self.least_bytes:
            return None
        left = min((most_bytes - self.least_bytes) // self._unit, len(self._picks[0]) - 1)
        picked = []
        for pick, units in zip(self._picks, self._units, strict=True):
            picked.append(int(pick[left]))
            left -= units[picked[-1]]
        return self._choice(picked)

    def _choice(self, picked: Sequence[int]) -> Choice:
        options = [block[one] for block, one in zip(self._options, picked, strict=True)]
        cost = 0.0
        for option in reversed(options):  # in the order of the programme
            cost = option.cost + cost
        size_bytes = sum(option.size_bytes for option in options)
        return Choice(picked=tuple(picked), size_bytes=size_bytes, cost=cost)

    def curve(self, num_points: int) -> tuple[Choice, ...]:
        """The best choices at evenly spaced budgets, by size: each costs less than those before."""
        steps = max(1, num_points - 1)
        span = self.most_bytes - self.least_bytes
        found: list[Choice] = []
        for step in range(steps + 1):
            choice = self.within(self.least_bytes + span * step // steps)
            assert choice is not None
            if not found or choice.cost < found[-1].cost:
                found.append(choice)
        return tuple(found)
