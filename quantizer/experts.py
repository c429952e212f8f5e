"""Statistics of experts, each of which reads rows of its own: those that a router sends to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from quantizer.errors import CalibrationError
from quantizer.hessian import CalibrationStatistics, HessianSum

if TYPE_CHECKING:  # drivers compute nothing, and import no JAX
    from jax import Array

_ROWS_PER_INPUT = 4


@dataclass(frozen=True, slots=True)
class ExpertHessians:
    """Σ xᵀx over the rows of each of some experts, [experts, in_features, in_features], float32.

    Attributes:
        rows_E: how many rows each sum is over, int64; an expert that no token reached has 0, and a
            sum of zeros.
        first: number of the expert whose sum is the first.
    """

    gram_ECC: NDArray[np.float32] | Array
    rows_E: NDArray[np.int64]
    first: int = 0

    @property
    def experts(self) -> range:
        """Numbers of the experts."""
        return range(self.first, self.first + len(self.rows_E))

    def of_expert(self, expert: int) -> HessianSum:
        """The statistics of one expert, by its number; a view of the sum."""
        index = self.experts.index(expert)
        return HessianSum(self.gram_ECC[index], int(self.rows_E[index]))

    def merge(self, other: ExpertHessians) -> ExpertHessians:
        """The sums over both.

        Raises:
            CalibrationError: they are of other experts.
        """
        if (self.experts, self.gram_ECC.shape) != (other.experts, other.gram_ECC.shape):
            raise CalibrationError(
                f"cannot merge sums of experts {self.experts} {self.gram_ECC.shape} and "
                f"{other.experts} {other.gram_ECC.shape}"
            )
        return ExpertHessians(
            self.gram_ECC + other.gram_ECC, self.rows_E + other.rows_E, self.first
        )


InputStatistics: TypeAlias = CalibrationStatistics | ExpertHessians
"""What calibration knows of the inputs of layers, or of experts."""


_RANGE_BYTES = 256 << 20
_PASS_BYTES = 1 << 30
_MIN_RANGES = 16


def num_expert_ranges(num_experts: int, in_features: int) -> int:
    """How many ranges of experts to solve apart.

    Their Hessians take 256 MiB at most where an expert's does, and there are enough ranges for
    several workers.
    """
    in_a_range = max(1, _RANGE_BYTES // (4 * in_features**2))
    return min(num_experts, max(_MIN_RANGES, -(-num_experts // in_a_range)))


def expert_ranges(num_experts: int, num_ranges: int) -> list[range]:
    """Cut experts into ranges whose sizes differ by one at most."""
    edges = [num_experts * i // num_ranges for i in range(num_ranges + 1)]
    return [range(a, b) for a, b in pairwise(edges)]


def expert_passes(ranges: Sequence[range], in_features: int) -> list[list[int]]:
    """Numbers of the ranges whose statistics are summed at once: 1 GiB where a range's take less.

    What is summed beside it changes no sum, so that this decides memory and time alone.
    """
    passes: list[list[int]] = [[]]
    room = _PASS_BYTES
    for number, experts in enumerate(ranges):
        size = 4 * in_features**2 * len(experts)
        if passes[-1] and size > room:
            passes.append([])
            room = _PASS_BYTES
        passes[-1].append(number)
        room -= size
    return passes


def token_floor(in_features: int) -> int:
    """Rows that are enough: four for each input, with which correlations count for 80%.

    More gain little, and fewer than one for each input leave most of what GPTQ can gain undone.
    """
    return _ROWS_PER_INPUT * in_features
