"""Drift correction: compensate what already quantized layers did to a layer's inputs.

A layer after quantized layers sees x̃, but should give the outputs it gave for x: x is its input in
the float model, all of whose layers before it are in float, and x̃ its input in the quantized one,
all of whose layers before it are quantized, those of its own block too. GPTAQ (arXiv 2504.02692,
Eq. 4) and Qronos (arXiv 2505.11695) ask for min ‖x Wᵀ - x̃ Ŵᵀ‖². Over real-valued weights its
minimum is a shift of the target, after which plain GPTQ on the Hessian of x̃ solves the rest:

    W' = W + α · W · Σ(x - x̃)ᵀx̃ · (Σ x̃ᵀx̃ + damping)⁻¹

A shift that fits its own rows need not serve others. Where rows are held back that it was not
found on, they choose α for each layer: the error on them is a parabola in α, with its minimum in
closed form. Rounding adds much the same error to either target, and is left out of the choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.linalg import cho_factor, cho_solve
from numpy.typing import ArrayLike

from quantizer.errors import CalibrationError, UnusableStatisticsError
from quantizer.gptq.factor import dampings
from quantizer.hessian import Float32, HessianSum, check_mergeable
from quantizer.jit import product, program
from quantizer.problem import LayerProblem
from quantizer.result import DriftJudgement


@dataclass(frozen=True, slots=True)
class DriftSum:
    """Σ (x - x̃)ᵀ x̃ over calibration rows (tokens), [in_features, in_features], float32.

    It may be an array of JAX on a device, where all work on it is then done.
    """

    cross_CC: Float32 | Array
    num_rows: int

    @classmethod
    def of(cls, inputs: ArrayLike, quantized_inputs: ArrayLike) -> DriftSum:
        """The sum over inputs [..., C] of the float model and of the quantized one.

        Raises:
            CalibrationError: shapes differ, or values are not finite.
        """
        drift, seen = _rows(inputs, quantized_inputs)
        with np.errstate(over="ignore", invalid="ignore"):
            cross_CC = (drift.T @ seen).astype(np.float32)
        # The sum is not finite if any input is not, or if it overflows.
        if not np.isfinite(cross_CC).all():
            raise CalibrationError("inputs contain NaN or infinity; check the model's outputs")
        return cls(cross_CC, seen.shape[0])

    def merge(self, other: DriftSum) -> DriftSum:
        """The sum over both."""
        check_mergeable(self.cross_CC, other.cross_CC)
        return DriftSum(self.cross_CC + other.cross_CC, self.num_rows + other.num_rows)


@dataclass(frozen=True, slots=True)
class HeldBackSums:
    """Over rows that are held back: Σ x̃ᵀx̃, Σ (x - x̃)ᵀx̃ and Σ (x - x̃)ᵀ(x - x̃)."""

    hessian: HessianSum
    drift: DriftSum
    spread_CC: Float32 | Array

    @classmethod
    def of(cls, inputs: ArrayLike, quantized_inputs: ArrayLike) -> HeldBackSums:
        """The sums over inputs [..., C] of the float model and of the quantized one."""
        drift, _ = _rows(inputs, quantized_inputs)
        hessian = HessianSum.of(quantized_inputs)
        return cls(hessian, DriftSum.of(inputs, quantized_inputs), drift.T @ drift)


@dataclass(frozen=True, slots=True)
class JudgedDrift:
    """A drift whose correction is judged on rows that had no part in it.

    Attributes:
        hessian, drift: over the rows on which the correction that is judged is found.
        held_back: over the others. The correction that is made is found on both.
    """

    hessian: HessianSum
    drift: DriftSum
    held_back: HeldBackSums

    @property
    def whole(self) -> DriftSum:
        """The sum over all rows."""
        return self.drift.merge(self.held_back.drift)


Drift: TypeAlias = DriftSum | JudgedDrift
"""What is known of a drift; without rows that are held back it is corrected as told."""


def _rows(inputs: ArrayLike, quantized_inputs: ArrayLike) -> tuple[Float32, Float32]:
    """x - x̃ and x̃ as rows, [N, C]."""
    exact = np.asarray(inputs, dtype=np.float32)
    seen = np.asarray(quantized_inputs, dtype=np.float32)
    if exact.shape != seen.shape or exact.ndim < 2:
        raise CalibrationError(
            f"the two inputs must share one shape [..., in_features], got {exact.shape} "
            f"and {seen.shape}"
        )
    seen = seen.reshape(-1, seen.shape[-1])
    with np.errstate(invalid="ignore"):
        return exact.reshape(seen.shape) - seen, seen


def correct_layers(
    layers: Sequence[LayerProblem],
    hessian: HessianSum,
    drift: Drift,
    *,
    strength: float,
    hessian_damping: float,
) -> list[tuple[LayerProblem, DriftJudgement | None]]:
    """Layers of one input with the targets to approximate, and what was judged of each.

    Args:
        hessian: over all rows.
        strength: share of the drift to correct; of a judged one, the most.

    Raises:
        CalibrationError: as `correct_target`.
    """
    name = layers[0].name
    whole = drift.whole if isinstance(drift, JudgedDrift) else drift
    step_CC = _step(hessian, whole, hessian_damping, name)
    if not isinstance(drift, JudgedDrift):
        return [(_moved(layer, step_CC, strength), None) for layer in layers]
    judged_CC = _step(drift.hessian, drift.drift, hessian_damping, name)
    found: list[tuple[LayerProblem, DriftJudgement | None]] = []
    for layer in layers:
        judgement = judge(layer.weight_RC, judged_CC, drift.held_back, most=strength)
        found.append((_moved(layer, step_CC, judgement.strength), judgement))
    return found


def correct_target(
    weight_RC: Float32,
    hessian: HessianSum,
    drift: DriftSum,
    *,
    strength: float,
    hessian_damping: float,
    name: str = "weight",
) -> Float32:
    """The weights whose outputs on the drifted inputs are nearest to W's on the exact ones.

    Raises:
        CalibrationError: the drift covers other rows than the Hessian or is not finite, or no
            damping made the Hessian definite; the message names the layer.
    """
    step_CC = _step(hessian, drift, hessian_damping, name)
    return _shifted(weight_RC, step_CC, strength)


def judge(
    weight_RC: Float32, step_CC: Array, held_back: HeldBackSums, *, most: float
) -> DriftJudgement:
    """How much of a correction lowers the error on rows that are held back.

    With d = x - x̃ and the correction's full step T = W · step, the error of α of it is
    ‖d Wᵀ - α x̃ Tᵀ‖² = tr(W Σdᵀd Wᵀ) - 2 α tr(W Σdᵀx̃ Tᵀ) + α² tr(T Σx̃ᵀx̃ Tᵀ).

    Args:
        step_CC: of the correction as found on other rows.
        most: the largest α.
    """
    hessian_CC, cross_CC = held_back.hessian.gram_CC, held_back.drift.cross_CC
    sums = map(jnp.asarray, (hessian_CC, cross_CC, held_back.spread_CC))
    found = _parabola(jnp.asarray(weight_RC), step_CC, *sums)
    plain, gain, cost, energy = (float(number) for number in found)
    strength = min(max(gain / cost, 0.0), most) if cost > 0 else 0.0
    error = plain - 2 * strength * gain + strength**2 * cost
    return DriftJudgement(
        strength=strength,
        held_back_error=max(error, 0.0) / energy if energy > 0 else 0.0,
        uncorrected_error=max(plain, 0.0) / energy if energy > 0 else 0.0,
    )


@program()
def _parabola(
    weight_RC: Array, step_CC: Array, hessian_CC: Array, cross_CC: Array, spread_CC: Array
) -> tuple[Array, Array, Array, Array]:
    """‖d Wᵀ‖², ⟨d Wᵀ, x̃ Tᵀ⟩, ‖x̃ Tᵀ‖² and ‖x Wᵀ‖²."""
    moved_RC = product(weight_RC, step_CC)
    crossed_RC = product(weight_RC, cross_CC)
    plain = jnp.sum(product(weight_RC, spread_CC) * weight_RC)
    gain = jnp.sum(crossed_RC * moved_RC)
    cost = jnp.sum(product(moved_RC, hessian_CC) * moved_RC)
    seen = jnp.sum(product(weight_RC, hessian_CC) * weight_RC)
    return plain, gain, cost, seen + 2 * jnp.sum(crossed_RC * weight_RC) + plain


def _moved(layer: LayerProblem, step_CC: Array, strength: float) -> LayerProblem:
    if strength == 0:
        return layer
    return replace(layer, weight_RC=_shifted(layer.weight_RC, step_CC, strength))


def _shifted(weight_RC: Float32, step_CC: Array, strength: float) -> Float32:
    return np.asarray(_sum(jnp.asarray(weight_RC), step_CC, jnp.float32(strength)))


@program()
def _sum(weight_RC: Array, step_CC: Array, strength: Array) -> Array:
    return weight_RC + strength * product(weight_RC, step_CC)


def _step(hessian: HessianSum, drift: DriftSum, hessian_damping: float, name: str) -> Array:
    """Σ(x - x̃)ᵀx̃ · (Σ x̃ᵀx̃ + damping)⁻¹, [C, C]."""
    if drift.num_rows != hessian.num_rows or drift.cross_CC.shape != hessian.gram_CC.shape:
        raise CalibrationError(
            f"{name}: the drift covers {drift.num_rows} rows of {drift.cross_CC.shape[0]} "
            f"inputs, the Hessian {hessian.num_rows} rows of {hessian.gram_CC.shape[0]}; both "
            "must come from the same calibration rows"
        )
    if not _is_finite(drift.cross_CC):
        raise UnusableStatisticsError(
            f"{name}: the drift contains NaN or infinity; look for non-finite activations"
        )
    diagonal_C = hessian.diagonal()
    live_C = diagonal_C > 0
    if not live_C.any():
        # Nothing is answered on inputs of zeros alone, as some of a layer's rows may have.
        return jnp.zeros_like(drift.cross_CC)
    mean = float(diagonal_C[live_C].mean())
    for damping in dampings(hessian_damping):
        shift_C = np.where(live_C, damping * mean, mean).astype(np.float32)
        given = map(jnp.asarray, (hessian.gram_CC, shift_C, drift.cross_CC))
        step_CC = _solved(*given)
        if _is_finite(step_CC):
            return step_CC
    raise CalibrationError(
        f"{name}: the Hessian is indefinite, so it is no sum of xᵀx; rebuild it with "
        "HessianSum.of(inputs)"
    )


def _is_finite(sum_CC: Float32 | Array) -> bool:
    return bool(_all_finite(jnp.asarray(sum_CC)))


@program()
def _all_finite(array: Array) -> Array:
    return jnp.isfinite(array).all()


@program()
def _solved(gram_CC: Array, shift_C: Array, cross_CC: Array) -> Array:
    factor = cho_factor(gram_CC + jnp.diag(shift_C), lower=True)
    solved: Array = cho_solve(factor, cross_CC.T).T
    return solved
