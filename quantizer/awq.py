"""AWQ (arXiv 2306.00978, Eq. 4-5): scale up the inputs that matter, round, scale back down.

The scale of an input is its magnitude raised to an exponent, which is searched. With a Hessian
each exponent is judged by the layer's true output error tr(Δ H Δᵀ), as the paper does on
calibration data; with magnitudes alone by H's diagonal, as Keras does. An exponent of 0 is
round-to-nearest, so AWQ never loses to it. An input that calibration never saw is taken for an
average one: other text may use it.
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from quantizer.hessian import (
    CalibrationStatistics,
    HessianSum,
    MagnitudeSum,
    energy_with_unseen,
)
from quantizer.jit import product, program
from quantizer.problem import LayerProblem
from quantizer.qparams import contiguous_groups, decode, encode, find_grid
from quantizer.result import Float32, GroupedWeight, SolveReport, SolveResult, weight_error
from quantizer.schemes import AWQScheme

_MAX_CODE = 15.0
_SMALLEST_SCALE = 1e-4
_SMALLEST_MAGNITUDE = 1e-8
"""A smaller input counts as never seen."""


@program(static_argnames=("group_size", "search", "scale_dtype"))
def _attempt(
    weight_CR: Array,
    input_scale_C: Array,
    energy_C: Array,
    searched_energy_C: Array,
    gram_CC: Array | None,
    *,
    group_size: int,
    search: bool,
    scale_dtype: str,
) -> tuple[Array, Array, Array, Array]:
    """Codes, scales, zero points and loss of one choice of input scales."""
    scaled_CR = weight_CR * input_scale_C[:, None]
    scale_GR, zero_GR = find_grid(
        scaled_CR,
        # The energy of an error once it is scaled back.
        (searched_energy_C / input_scale_C**2)[:, None],
        weight_bits=4,
        group_size=group_size,
        symmetric=False,
        search=search,
        scale_dtype=scale_dtype,
    )
    size = weight_CR.shape[0] if group_size == -1 else group_size
    group_C = jnp.arange(weight_CR.shape[0]) // size
    scale_CR, zero_CR = scale_GR[group_C], zero_GR[group_C]
    codes_CR = encode(scaled_CR, scale_CR, zero_CR, _MAX_CODE)
    error_CR = weight_CR - decode(codes_CR, scale_CR, zero_CR) / input_scale_C[:, None]
    if gram_CC is None:
        loss = jnp.sum(energy_C[:, None] * error_CR**2)
    else:
        loss = jnp.sum(error_CR * product(gram_CC, error_CR))
    return codes_CR.astype(jnp.uint8), scale_GR, zero_GR, loss


def _input_scales(magnitude_C: Float32, ratio: float) -> Float32:
    """magnitude^ratio, centred so that the largest and smallest are reciprocal (as Keras).

    Inputs never seen get the scale of the others' geometric mean.
    """
    unseen_C = magnitude_C < _SMALLEST_MAGNITUDE
    if unseen_C.any():
        # Any constant would be far from inputs that are all large, or all small.
        logs = np.log(magnitude_C[~unseen_C], dtype=np.float64)
        typical = np.exp(np.mean(logs)) if logs.size else 1.0
        magnitude_C = np.where(unseen_C, np.float32(typical), magnitude_C)
    scale_C = np.maximum(np.power(magnitude_C, np.float32(ratio)), np.float32(_SMALLEST_SCALE))
    centre = np.sqrt(scale_C.max() * scale_C.min())
    centred_C: Float32 = (scale_C / np.maximum(centre, np.float32(1e-8))).astype(np.float32)
    return centred_C


def solve_awq(
    layer: LayerProblem, statistics: CalibrationStatistics, scheme: AWQScheme
) -> SolveResult:
    """Search the input scales and quantize; a HessianSum judges by the true output error."""
    weight_RC, row_groups = layer.weight_RC, layer.row_groups
    if row_groups is not None:
        # Keras repeats the inputs along its rows (Gemma: once a head), each row with an input
        # scale of its own. The Hessian of that matrix would be one block a head; magnitudes hold
        # all that Keras' own criterion uses.
        weight_RC = np.ascontiguousarray(row_groups.to_stored(weight_RC))
        statistics = _spread(statistics, row_groups.input_of_row())
    if isinstance(statistics, HessianSum):
        energy_C = np.float32(2 / statistics.num_rows) * np.diagonal(statistics.gram_CC)
        magnitude_C = np.sqrt(energy_C / 2)
        gram_CC = jnp.asarray(statistics.gram_CC) * (2.0 / statistics.num_rows)
    else:
        energy_C = np.float32(2 / statistics.num_rows) * statistics.sum_square_C
        magnitude_C = statistics.sum_abs_C / np.float32(statistics.num_rows)
        gram_CC = None
    searched_energy_C = energy_with_unseen(energy_C, energy_C == 0)
    weight_CR = jnp.asarray(weight_RC.T)

    def attempt(ratio: float, search: bool) -> tuple[tuple[Array, ...], Float32, float]:
        scale_C = _input_scales(magnitude_C, ratio)
        scale_C = scale_C.astype(layer.scale_dtype).astype(np.float32)
        *found, loss = _attempt(
            weight_CR,
            jnp.asarray(scale_C),
            jnp.asarray(energy_C),
            jnp.asarray(searched_energy_C),
            gram_CC,
            group_size=scheme.group_size,
            search=search,
            scale_dtype=layer.scale_dtype,
        )
        return tuple(found), scale_C, max(float(loss), 0.0)

    found, scale_C, loss = attempt(0.0, search=False)
    rtn_loss, best_ratio = loss, 0.0
    kept: Literal["awq", "rtn"] = "rtn"
    first = 0 if scheme.clip_search else 1
    for step in range(first, scheme.num_grid_points + 1):
        ratio = step / scheme.num_grid_points
        candidate = attempt(ratio, scheme.clip_search)
        if candidate[2] < loss:
            (found, scale_C, loss), best_ratio, kept = candidate, ratio, "awq"
    codes_CR, scale_GR, zero_GR = (np.asarray(array) for array in found)
    weight = GroupedWeight(
        np.ascontiguousarray(codes_CR.T),
        np.ascontiguousarray(scale_GR.T),
        np.ascontiguousarray(zero_GR.T).astype(np.uint8),
        contiguous_groups(weight_RC.shape[1], scheme.group_size),
        scale_C,
    )
    reason = (
        f"input scales of magnitude^{best_ratio:.2f} had the lowest output error"
        if kept == "awq"
        else "no input scale or clipping lowered the output error"
    )
    return SolveResult(
        weight,
        SolveReport(
            weight_error=weight_error(weight_RC, weight.dequantize()),
            output_error=loss,
            rtn_output_error=rtn_loss,
            kept=kept,
            reason=reason,
            rtn_rows=weight_RC.shape[0] if kept == "rtn" else 0,
            dead_inputs=int(np.sum(energy_C == 0)),
            num_rows=statistics.num_rows,
            ratio=best_ratio,
        ),
    )


def _spread(statistics: CalibrationStatistics, input_of_row: NDArray[np.intp]) -> MagnitudeSum:
    """Input magnitudes by stored row; a Hessian gives them in root mean square."""
    if isinstance(statistics, HessianSum):
        square_C = statistics.gram_CC.diagonal()
        root_C = np.sqrt(square_C / np.float32(statistics.num_rows))
        statistics = MagnitudeSum(
            root_C * np.float32(statistics.num_rows),
            square_C,
            np.sqrt(square_C),
            statistics.num_rows,
        )
    return MagnitudeSum(
        statistics.sum_abs_C[input_of_row],
        statistics.sum_square_C[input_of_row],
        statistics.max_abs_C[input_of_row],
        statistics.num_rows,
    )
