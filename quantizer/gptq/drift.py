"""Drift correction: compensate what already quantized layers did to a layer's inputs.

A layer after quantized layers sees x̃, but should give the outputs it gave for x.
GPTAQ (arXiv 2504.02692, Eq. 4) asks for min ‖x Wᵀ - x̃ Ŵᵀ‖². Over real-valued weights its
minimum is a shift of the target, after which plain GPTQ on the Hessian of x̃ solves the rest:

    W' = W + α · W · Σ(x - x̃)ᵀx̃ · (Σ x̃ᵀx̃ + damping)⁻¹
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_factor, cho_solve
from numpy.typing import ArrayLike

from quantizer.errors import CalibrationError
from quantizer.gptq.factor import dampings
from quantizer.hessian import Float32, HessianSum, check_mergeable


@dataclass(frozen=True, slots=True)
class DriftSum:
    """Σ (x - x̃)ᵀ x̃ over calibration rows (tokens), [in_features, in_features], float32."""

    cross_CC: Float32
    num_rows: int

    @classmethod
    def of(cls, inputs: ArrayLike, quantized_inputs: ArrayLike) -> DriftSum:
        """The sum over inputs [..., C] of the float model and of the quantized one.

        Raises:
            CalibrationError: shapes differ, or values are not finite.
        """
        exact = np.asarray(inputs, dtype=np.float32)
        seen = np.asarray(quantized_inputs, dtype=np.float32)
        if exact.shape != seen.shape or exact.ndim < 2:
            raise CalibrationError(
                f"the two inputs must share one shape [..., in_features], got {exact.shape} "
                f"and {seen.shape}"
            )
        seen = seen.reshape(-1, seen.shape[-1])
        # The sum is not finite if any input is not, or if it overflows.
        with np.errstate(over="ignore", invalid="ignore"):
            drift = exact.reshape(seen.shape) - seen
            cross_CC = (drift.T @ seen).astype(np.float32)
        if not np.isfinite(cross_CC).all():
            raise CalibrationError("inputs contain NaN or infinity; check the model's outputs")
        return cls(cross_CC, seen.shape[0])

    def merge(self, other: DriftSum) -> DriftSum:
        """The sum over both."""
        check_mergeable(self.cross_CC, other.cross_CC)
        return DriftSum(self.cross_CC + other.cross_CC, self.num_rows + other.num_rows)


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
    if drift.num_rows != hessian.num_rows or drift.cross_CC.shape != hessian.gram_CC.shape:
        raise CalibrationError(
            f"{name}: the drift covers {drift.num_rows} rows of {drift.cross_CC.shape[0]} "
            f"inputs, the Hessian {hessian.num_rows} rows of {hessian.gram_CC.shape[0]}; both "
            "must come from the same calibration rows"
        )
    if not np.isfinite(drift.cross_CC).all():
        raise CalibrationError(
            f"{name}: the drift contains NaN or infinity; look for non-finite activations"
        )
    diagonal_C = hessian.diagonal()
    live_C = diagonal_C > 0
    mean = float(diagonal_C[live_C].mean())
    for damping in dampings(hessian_damping):
        shift_C = np.where(live_C, damping * mean, mean).astype(np.float32)
        factor = cho_factor(jnp.asarray(hessian.gram_CC + np.diag(shift_C)), lower=True)
        step_CC = np.asarray(cho_solve(factor, jnp.asarray(drift.cross_CC.T))).T
        if np.isfinite(step_CC).all():
            shifted: Float32 = weight_RC + np.float32(strength) * (weight_RC @ step_CC)
            return shifted
    raise CalibrationError(
        f"{name}: the Hessian is indefinite, so it is no sum of xᵀx; rebuild it with "
        "HessianSum.of(inputs)"
    )
