"""Round to nearest: int8, int4 and float8.

int8 and int4 use the operations of `keras.quantizers` in the same order and dtype, so that codes
and scales are Keras' own, bit for bit. One exception: Keras' int4 groups corrupt weights whose
range does not span zero (it clips the zero point without widening the range); here every range
includes 0.

float8 keeps E4M3 values under one scale for the weight and one for the inputs. At every call
stock Keras divides by the stored scale, rounds to E4M3 and multiplies back. It leaves the scales
at 1 when it quantizes; here they come from the weights and from calibration, so that the first
answer is already right. E5M2 is Keras' format for gradients, which inference never reads.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from quantizer.hessian import CalibrationStatistics, MagnitudeSum
from quantizer.problem import LayerProblem
from quantizer.qparams import contiguous_groups, num_groups
from quantizer.result import (
    ChannelWeight,
    Float8Weight,
    Float32,
    GroupedWeight,
    SolveReport,
    SolveResult,
    output_error,
    weight_error,
)
from quantizer.row_stripes import by_rows
from quantizer.schemes import Float8Scheme, Int4Scheme, Int8Scheme

# Keras' own guard against a division by zero (keras.config.epsilon's default).
_EPSILON = np.float32(1e-7)
_INT4_LOW, _INT4_HIGH = -8, 7


def round_channels(weight_RC: Float32, *, low: int, high: int, scale_dtype: str) -> ChannelWeight:
    """One symmetric scale per output channel: code = round(w · scale), scale = high / max|w|.

    Args:
        low, high: the code range, (-127, 127) for int8 and (-8, 7) for int4.
        scale_dtype: dtype in which the scale will be stored; it is rounded to it first.
    """
    codes_RC = np.empty_like(weight_RC, np.int8)
    scale_R = np.empty(len(weight_RC), np.float32)

    def round_rows(rows: slice) -> None:
        part_RC = weight_RC[rows]
        scale_R1 = np.float32(high) / (np.abs(part_RC).max(1, keepdims=True) + _EPSILON)
        # A tiny channel's scale can exceed float16; clipped, it only leaves codes small.
        scale_R1 = np.minimum(scale_R1, np.float32(ml_dtypes.finfo(scale_dtype).max))
        scale_R1 = scale_R1.astype(scale_dtype).astype(np.float32)
        codes_RC[rows] = np.clip(np.round(part_RC * scale_R1), low, high)
        scale_R[rows] = scale_R1[:, 0]

    by_rows(round_rows, weight_RC.shape)
    return ChannelWeight(codes_RC, scale_R)


def round_groups(weight_RC: Float32, *, block_size: int, scale_dtype: str) -> GroupedWeight:
    """int4 with a scale and a zero point for each `block_size` inputs; the last may have fewer.

    Arguments as in `round_channels`.
    """
    num_outputs, num_inputs = weight_RC.shape
    block_size = min(block_size, num_inputs)
    groups = num_groups(num_inputs, block_size)
    codes_RC = np.empty((num_outputs, num_inputs), np.int8)
    scale_RG = np.empty((num_outputs, groups), np.float32)
    zero_RG = np.empty((num_outputs, groups), np.int8)
    smallest = np.float32(ml_dtypes.finfo(scale_dtype).smallest_subnormal)

    def round_rows(rows: slice) -> None:
        padded = np.pad(weight_RC[rows], ((0, 0), (0, groups * block_size - num_inputs)))
        weight_RGS = padded.reshape(-1, groups, block_size)
        low = np.minimum(weight_RGS.min(2), 0)
        high = np.maximum(weight_RGS.max(2), 0)
        scale = (high - low + _EPSILON) / np.float32(_INT4_HIGH - _INT4_LOW)
        # float16 would round the step of a tiny group to 0.
        scale = np.maximum(scale, smallest).astype(scale_dtype).astype(np.float32)
        zero = np.clip(np.round(-low / scale) + _INT4_LOW, _INT4_LOW, _INT4_HIGH)
        codes_RGS = np.round(weight_RGS / scale[..., None]) + zero[..., None]
        codes_RGS = np.clip(codes_RGS, _INT4_LOW, _INT4_HIGH)
        codes_RC[rows] = codes_RGS.reshape(len(padded), -1)[:, :num_inputs]
        scale_RG[rows], zero_RG[rows] = scale, zero

    by_rows(round_rows, weight_RC.shape)
    return GroupedWeight(codes_RC, scale_RG, zero_RG, contiguous_groups(num_inputs, block_size))


def solve_int(
    layer: LayerProblem,
    statistics: CalibrationStatistics | None,
    scheme: Int8Scheme | Int4Scheme,
) -> SolveResult:
    """Round a layer to int8 or int4; the statistics serve to report its output error."""
    weight_RC, row_groups, scale_dtype = layer.weight_RC, layer.row_groups, layer.scale_dtype
    weight: ChannelWeight | GroupedWeight
    if isinstance(scheme, Int8Scheme):
        weight = round_channels(weight_RC, low=-127, high=127, scale_dtype=scale_dtype)
    else:
        stored_RC = weight_RC if row_groups is None else row_groups.to_stored(weight_RC)
        stored_RC = np.ascontiguousarray(stored_RC)
        if scheme.block_size == -1:
            weight = round_channels(
                stored_RC, low=_INT4_LOW, high=_INT4_HIGH, scale_dtype=scale_dtype
            )
        else:
            weight = round_groups(stored_RC, block_size=scheme.block_size, scale_dtype=scale_dtype)
    decoded_RC = weight.dequantize()
    if row_groups is not None:
        decoded_RC = row_groups.to_matrix(decoded_RC)
    loss = None if statistics is None else output_error(weight_RC, decoded_RC, statistics)
    return SolveResult(
        weight,
        SolveReport(
            weight_error=weight_error(weight_RC, decoded_RC),
            output_error=loss,
            rtn_output_error=loss,
            kept="rtn",
            reason=f"{scheme.mode} rounds to nearest",
            rtn_rows=weight_RC.shape[0],
            num_rows=0 if statistics is None else statistics.num_rows,
        ),
    )


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


def solve_float8(weight_RC: Float32, inputs: MagnitudeSum, scheme: Float8Scheme) -> SolveResult:
    """Find both scales, from the weights and from the inputs' magnitudes; round the weights."""
    weight_amax = float(np.abs(weight_RC).max(initial=0.0))
    input_amax = float(inputs.max_abs_C.max(initial=0.0))
    weight_scale = float8_scale(weight_amax, power_of_two=scheme.power_of_two)
    input_scale = float8_scale(input_amax, power_of_two=scheme.power_of_two)
    value_RC = round_to_float8(weight_RC, weight_scale)
    # Magnitudes give the Hessian's diagonal alone.
    energy_C = 2.0 / inputs.num_rows * inputs.sum_square_C.astype(np.float64)
    loss = float(np.sum(np.square(weight_RC - value_RC, dtype=np.float64) @ energy_C))
    return SolveResult(
        Float8Weight(
            value_RC, weight_scale, input_scale, np.float32(weight_amax), np.float32(input_amax)
        ),
        SolveReport(
            weight_error=weight_error(weight_RC, value_RC),
            output_error=loss,
            rtn_output_error=loss,
            kept="rtn",
            reason="float8 rounds to nearest; the output error takes inputs as uncorrelated",
            dead_inputs=int(np.sum(inputs.max_abs_C == 0)),
            num_rows=inputs.num_rows,
        ),
    )
