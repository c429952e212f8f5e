"""Calibration statistics: raw sums over a layer's input rows, which can be merged.

Sums travel and are merged, never means: means over uneven shards would weigh rows unequally.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quantizer.errors import CalibrationError, UnusableStatisticsError

if TYPE_CHECKING:  # drivers merge no sums, and import no JAX
    from jax import Array

Float32 = NDArray[np.float32]
_Sum = TypeVar("_Sum")

# Beyond these float32 overflows: the squares of inputs, and the losses that solvers sum.
_LARGEST_INPUT = 1e15
_LARGEST_ENERGY = 1e16


def _rows(inputs: ArrayLike, mask: ArrayLike | None) -> Float32:
    """Inputs [..., C] as finite float32 rows [N, C], without the masked ones."""
    rows = np.asarray(inputs, dtype=np.float32)
    if rows.ndim < 2:
        raise CalibrationError(f"inputs must be [..., in_features], got shape {rows.shape}")
    rows = rows.reshape(-1, rows.shape[-1])
    if mask is not None:
        keep = np.asarray(mask, dtype=bool).reshape(-1)
        if keep.shape[0] != rows.shape[0]:
            raise CalibrationError(
                f"the mask has {keep.shape[0]} entries for {rows.shape[0]} rows of inputs"
            )
        rows = rows[keep]
    if not np.isfinite(rows).all():
        raise CalibrationError(
            "inputs contain NaN or infinity; check the model's own outputs in this precision"
        )
    if np.abs(rows).max(initial=0.0) > _LARGEST_INPUT:
        raise CalibrationError(
            f"inputs beyond {_LARGEST_INPUT:g} are too large to square; look for exploding "
            "activations in the model"
        )
    return rows


def check_mergeable(sum_C: Float32 | Array, other_C: Float32 | Array) -> None:
    """Refuse sums over different numbers of input features, [in_features, ...] each."""
    if sum_C.shape != other_C.shape:
        raise CalibrationError(
            f"cannot merge sums over {sum_C.shape[0]} and {other_C.shape[0]} input features"
        )


def correlation_share(num_rows: int, in_features: int, shrinkage: float) -> float:
    """What `HessianSum.shrunk` multiplies correlations by."""
    return num_rows / (num_rows + shrinkage * in_features)


@dataclass(frozen=True, slots=True)
class HessianSum:
    """Σ xᵀx over calibration rows (tokens), [in_features, in_features], float32.

    The Gram may be an array of JAX on a device, where all work on it is then done.
    """

    gram_CC: Float32 | Array
    num_rows: int

    @classmethod
    def of(cls, inputs: ArrayLike, mask: ArrayLike | None = None) -> HessianSum:
        """The sum over inputs [..., C]; rows where `mask` [...] is false are left out.

        Raises:
            CalibrationError: inputs that are not finite or of the wrong shape.
        """
        rows = _rows(inputs, mask)
        return cls(rows.T @ rows, rows.shape[0])

    def merge(self, other: HessianSum) -> HessianSum:
        """The sum over both; uneven shards weigh by their rows."""
        check_mergeable(self.gram_CC, other.gram_CC)
        return HessianSum(self.gram_CC + other.gram_CC, self.num_rows + other.num_rows)

    def shrunk(self, shrinkage: float) -> HessianSum:
        """The sum with correlations scaled by rows / (rows + shrinkage · inputs); energies stay.

        It is then what solving minimises, and what reports give as output errors: closer to other
        text's than the sum as it is, which fits its own rows. The fewer rows there are for each
        input, the less its correlations say. docs/accuracy.md shows what this gains on text like
        that of the calibration and unlike it.
        """
        num_inputs = self.gram_CC.shape[0]
        share = np.float32(correlation_share(self.num_rows, num_inputs, shrinkage))
        share_CC = np.full((num_inputs, num_inputs), share)
        np.fill_diagonal(share_CC, 1)
        return HessianSum(self.gram_CC * share_CC, self.num_rows)

    def diagonal(self) -> Float32:
        """Σx² by input feature, [in_features]: all of the Gram that leaves its device."""
        return np.asarray(self.gram_CC.diagonal())

    def check(self, in_features: int, name: str) -> None:
        """Refuse a sum that no solver can use; `name` is the layer, for the message.

        Raises:
            UnusableStatisticsError: empty, of the wrong shape, not finite, no sum of xᵀx, or all
                zero.
        """
        _check_sum(self.gram_CC.shape, (in_features, in_features), self.num_rows, name)
        # No copy is needed: a sum is finite only if all of its terms are, and where it overflows
        # the extremes tell.
        with np.errstate(over="ignore", invalid="ignore"):
            total = float(self.gram_CC.sum())
            if not np.isfinite(total):
                total = float(self.gram_CC.max()) - float(self.gram_CC.min())
        if not np.isfinite(total):
            raise UnusableStatisticsError(
                f"{name}: the Hessian contains NaN or infinity. Calibrate in a wider dtype "
                "(float32), or look for non-finite activations in the model."
            )
        diagonal_C = self.diagonal()
        if (diagonal_C < 0).any():
            raise UnusableStatisticsError(
                f"{name}: the Hessian has a negative diagonal, so it is no sum of xᵀx; rebuild "
                "it with HessianSum.of(inputs)"
            )
        _check_energy(diagonal_C, diagonal_C, self.num_rows, name)


@dataclass(frozen=True, slots=True)
class MagnitudeSum:
    """Σ|x|, Σx² and max|x| by input feature over calibration rows (tokens), float32.

    They are all that AWQ and float8 need.
    """

    sum_abs_C: Float32
    sum_square_C: Float32
    max_abs_C: Float32
    num_rows: int

    @classmethod
    def of(cls, inputs: ArrayLike, mask: ArrayLike | None = None) -> MagnitudeSum:
        """The sums over inputs [..., C]; rows where `mask` [...] is false are left out."""
        size = np.abs(_rows(inputs, mask))
        return cls(size.sum(0), np.square(size).sum(0), size.max(0, initial=0.0), size.shape[0])

    def merge(self, other: MagnitudeSum) -> MagnitudeSum:
        """The sums over both."""
        check_mergeable(self.sum_abs_C, other.sum_abs_C)
        return MagnitudeSum(
            self.sum_abs_C + other.sum_abs_C,
            self.sum_square_C + other.sum_square_C,
            np.maximum(self.max_abs_C, other.max_abs_C),
            self.num_rows + other.num_rows,
        )

    def check(self, in_features: int, name: str) -> None:
        """Refuse sums that no solver can use; `name` is the layer, for the message.

        Raises:
            UnusableStatisticsError: empty, of the wrong shape, not finite, or all zero.
        """
        arrays = (self.sum_abs_C, self.sum_square_C, self.max_abs_C)
        for array in arrays:
            _check_sum(array.shape, (in_features,), self.num_rows, name)
        sums = np.stack(arrays)
        if not np.isfinite(sums).all():
            raise UnusableStatisticsError(
                f"{name}: the input magnitudes contain NaN or infinity. Calibrate in a wider "
                "dtype (float32), or look for non-finite activations in the model."
            )
        if (sums < 0).any():
            raise UnusableStatisticsError(
                f"{name}: an input magnitude is negative; rebuild it with MagnitudeSum.of(inputs)"
            )
        _check_energy(self.max_abs_C, self.sum_square_C, self.num_rows, name)


FAINT = 1e-4
"""Share of the mean energy below which an input tells a solver next to nothing: the usual damping
of 0.01 adds a hundred times as much."""


def count_faint(energy_C: Float32) -> int:
    """Inputs whose energy, Σx², is below `FAINT` of the mean over those that have any, but not 0.

    Args:
        energy_C: up to a common factor.
    """
    seen_C = energy_C[energy_C > 0]
    if not seen_C.size:
        return 0
    return int(np.sum(seen_C < FAINT * np.mean(seen_C, dtype=np.float64)))


def energy_with_unseen(energy_C: Float32, dead_C: NDArray[np.bool_]) -> Float32:
    """What errors cost by input, where inputs that calibration never saw cost the others' mean."""
    if not dead_C.any():
        return energy_C
    mean = np.mean(energy_C[~dead_C], dtype=np.float64)
    return np.where(dead_C, np.float32(mean), energy_C)


CalibrationStatistics: TypeAlias = HessianSum | MagnitudeSum
"""What calibration knows of a layer's inputs."""


def tree_merge(sums: Sequence[_Sum], merge: Callable[[_Sum, _Sum], _Sum]) -> _Sum:
    """Reduce by a binary tree whose shape depends on the number of leaves alone.

    Floating-point addition is not associative: a fixed tree gives the same bits whichever leaf
    arrived first.
    """
    if not sums:
        raise CalibrationError("no calibration shard to reduce; give at least one")
    level = list(sums)
    while len(level) > 1:
        pairs = [merge(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level = pairs + level[len(pairs) * 2 :]
    return level[0]


def _check_sum(shape: tuple[int, ...], expected: tuple[int, ...], num_rows: int, name: str) -> None:
    if shape != expected:
        raise UnusableStatisticsError(
            f"{name}: the calibration sum has shape {shape}, but the weight has {expected[0]} "
            f"input features; expected {expected}"
        )
    if num_rows < 1:
        raise UnusableStatisticsError(
            f"{name}: no calibration row reached this layer. Raise num_samples, or give the "
            "layer a scheme that needs no calibration, such as int8."
        )


def _check_energy(size_C: Float32, sum_square_C: Float32, num_rows: int, name: str) -> None:
    # By sizes: the squares of tiny inputs are zero in float32.
    if not size_C.any():
        raise UnusableStatisticsError(
            f"{name}: every calibration input of this layer is zero, so nothing tells which "
            "weights matter. Check the padding mask and the calibration text, or use a scheme "
            "that needs no calibration, such as int8."
        )
    largest = float(sum_square_C.max()) / num_rows
    if largest > _LARGEST_ENERGY:
        raise UnusableStatisticsError(
            f"{name}: the largest mean square of an input is {largest:g}, too large to solve in "
            f"float32 (at most {_LARGEST_ENERGY:g}); look for exploding activations in the model"
        )
