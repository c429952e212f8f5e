"""What a solver returns: a quantized weight and a report of its errors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from quantizer.hessian import CalibrationStatistics, HessianSum
from quantizer.row_stripes import by_rows, sum_of_squares

Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class GroupedWeight:
    """value = (code - zero) · scale of the input's group, divided by the input's own scale if any.

    Attributes:
        codes_RC: uint8 (gptq, awq) or int8 (int4), one code per weight, not packed.
        scale_RG: [out_features, groups], float32, already rounded to its storage dtype.
        zero_RG: zero points, of the codes' dtype.
        group_C: group of each input, int32.
        input_scale_C: AWQ's scale of each input, by which weights were multiplied before rounding.
    """

    codes_RC: NDArray[np.uint8] | NDArray[np.int8]
    scale_RG: Float32
    zero_RG: NDArray[np.uint8] | NDArray[np.int8]
    group_C: NDArray[np.int32]
    input_scale_C: Float32 | None = None

    def dequantize(self) -> Float32:
        """The decoded weights, [out_features, in_features], float32."""
        value_RC = np.empty_like(self.codes_RC, np.float32)

        def decode(rows: slice) -> None:
            zero_RC = self.zero_RG[rows][:, self.group_C].astype(np.float32)
            difference_RC = self.codes_RC[rows].astype(np.float32) - zero_RC
            np.multiply(difference_RC, self.scale_RG[rows][:, self.group_C], out=value_RC[rows])
            if self.input_scale_C is not None:
                value_RC[rows] /= self.input_scale_C

        by_rows(decode, value_RC.shape)
        return value_RC


@dataclass(frozen=True, slots=True)
class ChannelWeight:
    """value = code / scale of the output channel (int8, and int4 per channel)."""

    codes_RC: NDArray[np.int8]
    scale_R: Float32

    def dequantize(self) -> Float32:
        """The decoded weights, [out_features, in_features], float32."""
        value_RC = np.empty_like(self.codes_RC, np.float32)

        def decode(rows: slice) -> None:
            np.divide(self.codes_RC[rows], self.scale_R[rows, None], out=value_RC[rows])

        by_rows(decode, value_RC.shape)
        return value_RC


@dataclass(frozen=True, slots=True)
class Float8Weight:
    """Weights on the E4M3 grid of one scale, kept as floats as Keras keeps them.

    Attributes:
        value_RC: [out_features, in_features], float32; value / weight_scale is E4M3.
        weight_scale, input_scale: what Keras divides by before casting to E4M3.
        input_amax: the largest |input| that calibration saw.
    """

    value_RC: Float32
    weight_scale: np.float32
    input_scale: np.float32
    weight_amax: np.float32
    input_amax: np.float32

    def dequantize(self) -> Float32:
        """The weights, [out_features, in_features], float32."""
        return self.value_RC


QuantizedWeight: TypeAlias = GroupedWeight | ChannelWeight | Float8Weight
"""Codes and what decodes them.

Of a matrix [out_features, in_features], or, for a layer solved with `RowGroups`, of its stored
matrix [columns, rows].
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftJudgement:
    """What a layer's drift correction does on calibration rows that it was not found on.

    Attributes:
        strength: share of the correction that is made, which lowers the error on these rows most;
            0 leaves the layer as it is.
        held_back_error: ‖x Wᵀ - x̃ W'ᵀ‖² / ‖x Wᵀ‖² over them, of the corrected target W' before
            it is rounded; x are the float model's inputs and x̃ the quantized one's.
        uncorrected_error: the same of W itself.
    """

    strength: float
    held_back_error: float
    uncorrected_error: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SolveReport:
    """The errors of one quantized layer, as plain values for records and reports.

    Attributes:
        weight_error: ‖W - Ŵ‖ / ‖W‖ (Frobenius).
        output_error: tr(Δ H Δᵀ), H = 2·gram/num_rows undamped: twice the mean squared error
            of the layer's output over calibration rows, if correlations are not shrunk. None
            without calibration.
        rtn_output_error: the same for round-to-nearest on the same grid.
        kept: whose codes were kept; "gptq+rtn" when output channels differ.
        reason: why, in words.
        rtn_rows: output channels for which round-to-nearest was kept.
        damping: share of the Hessian's mean diagonal that was added (gptq).
        dead_inputs: inputs that were zero in all of calibration; their weights are rounded to
            nearest.
        faint_inputs: inputs with next to no energy in calibration (see `hessian.FAINT`); omitted
            from plain values where there are none, since older versions did not know it.
        num_rows: calibration rows (tokens).
        ratio: AWQ's exponent of the input scales.
        drift: of a layer whose drift correction was judged; its errors above are distances from
            the corrected target. Omitted of others.
    """

    weight_error: float
    kept: Literal["gptq", "awq", "rtn", "gptq+rtn"]
    reason: str
    output_error: float | None = None
    rtn_output_error: float | None = None
    rtn_rows: int = 0
    damping: float | None = None
    dead_inputs: int = 0
    faint_inputs: int = 0
    num_rows: int = 0
    ratio: float | None = None
    drift: DriftJudgement | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        values = dataclasses.asdict(self)
        if not self.faint_inputs:
            del values["faint_inputs"]
        if self.drift is None:
            del values["drift"]
        return values


@dataclass(frozen=True, slots=True)
class SolveResult:
    """A quantized weight and its report."""

    weight: QuantizedWeight
    report: SolveReport


def relative_error(error_sum: float, energy_sum: float) -> float:
    """sqrt(Σ(w - ŵ)² / Σw²); a weight of zeros that stayed zero has no error."""
    return float(np.sqrt(error_sum / energy_sum)) if energy_sum > 0 else 0.0


def weight_error(weight_RC: Float32, decoded_RC: Float32) -> float:
    """‖W - Ŵ‖ / ‖W‖."""
    return relative_error(sum_of_squares(weight_RC, decoded_RC), sum_of_squares(weight_RC))


def output_error(
    weight_RC: Float32, decoded_RC: Float32, statistics: CalibrationStatistics
) -> float:
    """tr(Δ H Δᵀ), H = 2·gram/num_rows; with magnitudes alone, inputs are taken as uncorrelated."""
    delta_RC = weight_RC - decoded_RC
    if isinstance(statistics, HessianSum):
        loss = np.sum((delta_RC @ np.asarray(statistics.gram_CC)) * delta_RC, dtype=np.float64)
    else:
        loss = np.sum(np.square(delta_RC) @ statistics.sum_square_C, dtype=np.float64)
    return max(float(loss) * 2 / statistics.num_rows, 0.0)
