"""float8: E4M3 values under one calibrated scale for the weight and one for the inputs.

Stock Keras divides by the stored scale, rounds to E4M3 and multiplies back, at every call. It
leaves the scales at 1 when it quantizes; here they come from the weights and from calibration,
so the first answer is already right. E5M2 is Keras' format for gradients, which inference
never reads: its scale stays 1.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from quantizer.hessian import MagnitudeSum
from quantizer.schemes import Float8Scheme
from quantizer.solution import Account, Float8Weight, Float32, Solution, weight_error

AMAX_HISTORY_LENGTH = 1024
"""Entries of Keras' amax histories, by its default."""

E4M3_MAX = np.float32(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)


def float8_scale(amax: float, *, power_of_two: bool) -> np.float32:
    """The scale that maps amax onto E4M3's largest value, 448; 1 for an amax of 0.

    With `power_of_two` it is rounded up, so nothing is clipped.
    """
    if amax <= 0:
        return np.float32(1)
    # A subnormal amax would give a scale of 0, and a division by it.
    scale = max(np.float32(amax) / E4M3_MAX, np.finfo(np.float32).tiny)
    if power_of_two:
        scale = np.exp2(np.ceil(np.log2(scale)))
    return np.float32(scale)


def round_to_float8(value: Float32, scale: np.float32) -> Float32:
    """value / scale, clipped, rounded to E4M3 (ties to even), times scale, as Keras does it."""
    clipped = np.clip(value / scale, -E4M3_MAX, E4M3_MAX)
    rounded: Float32 = clipped.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    return rounded


def solve_float8(weight_RC: Float32, inputs: MagnitudeSum, scheme: Float8Scheme) -> Solution:
    """Calibrate both scales and round the weights.

    Args:
        weight_RC: [out_features, in_features], float32.
        inputs: magnitudes of the layer's inputs over calibration rows.
    """
    weight_amax = float(np.abs(weight_RC).max(initial=0.0))
    input_amax = float(inputs.max_abs_C.max(initial=0.0))
    weight_scale = float8_scale(weight_amax, power_of_two=scheme.power_of_two)
    input_scale = float8_scale(input_amax, power_of_two=scheme.power_of_two)
    value_RC = round_to_float8(weight_RC, weight_scale)
    # Without the Hessian, its diagonal: inputs taken as uncorrelated.
    energy_C = 2.0 / inputs.num_rows * inputs.sum_square_C.astype(np.float64)
    loss = float(np.sum(np.square(weight_RC - value_RC, dtype=np.float64) @ energy_C))
    return Solution(
        Float8Weight(
            value_RC,
            weight_scale,
            input_scale,
            np.float32(weight_amax),
            np.float32(input_amax),
        ),
        Account(
            weight_error=weight_error(weight_RC, value_RC),
            output_error=loss,
            rtn_output_error=loss,
            kept="rtn",
            reason="float8 rounds to nearest; the output error takes inputs as uncorrelated",
            dead_inputs=int(np.sum(inputs.max_abs_C == 0)),
            num_rows=inputs.num_rows,
        ),
    )
