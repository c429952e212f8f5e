"""AWQ (arXiv 2306.00978, Eq. 4-5): scale up the inputs that matter, round, scale back down.

The scale of an input is its magnitude raised to an exponent, which is searched. With a Hessian
each exponent is judged by the layer's true output error tr(Δ H Δᵀ), as the paper does on
calibration data; with magnitudes alone by H's diagonal, as Keras does. An exponent of 0 is
round-to-nearest, so AWQ never loses to it. An input that calibration never saw is taken for an
average one: other text may use it.

A foldable scheme gives all layers of one input the same scales, as §3.2 of the paper does, so that
what gives that input, such as a norm, can be divided by them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from quantizer.errors import SchemeError
from quantizer.hessian import (
    CalibrationStatistics,
    HessianSum,
    MagnitudeSum,
    count_faint,
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


@program(static_argnames=("group_size", "search", "scale_dtype", "together"))
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
    together: bool,
) -> tuple[Array, Array, Array, Array]:
    """Codes, scales, zero points and loss of one choice of input scales.

    Args:
        together: all groups at once (see `find_grid`).
    """
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
        together=together,
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


def _all_groups_together() -> bool:
    """A GPU would wait for the host between groups; a CPU keeps one at a time in its cache."""
    return jax.default_backend() != "cpu"


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


@dataclass(frozen=True)
class _Layer:
    """A layer as it is stored, and what its inputs weigh.

    Attributes:
        magnitude_C: of the inputs, by stored row; energy_C is twice their mean square.
        gram_CC: 2·gram/num_rows; None where magnitudes alone are known.
        input_of_row: the input that each stored row multiplies.
    """

    problem: LayerProblem
    weight_RC: Float32
    weight_CR: Array
    magnitude_C: Float32
    energy_C: Float32
    gram_CC: Array | None
    input_of_row: NDArray[np.intp]

    @classmethod
    def of(
        cls, problem: LayerProblem, statistics: CalibrationStatistics, gram_CC: Array | None
    ) -> _Layer:
        weight_RC, row_groups = problem.weight_RC, problem.row_groups
        input_of_row = np.arange(weight_RC.shape[1], dtype=np.intp)
        if row_groups is not None:
            # Keras repeats the inputs along its rows (Gemma: once a head), each row with an input
            # scale of its own. The Hessian of that matrix would be one block a head; magnitudes
            # hold all that Keras' own criterion uses.
            weight_RC = np.ascontiguousarray(row_groups.to_stored(weight_RC))
            input_of_row = row_groups.input_of_row()
            statistics, gram_CC = _spread(statistics, input_of_row), None
        magnitude_C, energy_C = _sizes(statistics)
        return cls(
            problem,
            weight_RC,
            jnp.asarray(weight_RC.T),
            magnitude_C,
            energy_C,
            gram_CC,
            input_of_row,
        )


@dataclass(frozen=True)
class _Attempt:
    """A layer quantized with one choice of input scales."""

    codes_CR: Array
    scale_GR: Array
    zero_GR: Array
    input_scale_C: Float32
    loss: float


def solve_awq(
    layers: Sequence[LayerProblem],
    statistics: CalibrationStatistics,
    scheme: AWQScheme,
    scale_of_input_C: NDArray[np.intp] | None = None,
) -> list[SolveResult]:
    """Search the input scales and quantize; a HessianSum judges by the true output error.

    Args:
        layers: of one input; if the scheme is foldable they share one vector of input scales, the
            one with the least output error in all of them together.
        scale_of_input_C: of a foldable scheme, the number of each input's scale: inputs of one
            number share it. One number for all leaves nothing to scale, so that each layer is
            solved as if alone. None: each input has its own.

    Raises:
        SchemeError: layers that share scales, but store them in different dtypes.
    """
    gram_CC = None
    if isinstance(statistics, HessianSum):
        gram_CC = jnp.asarray(statistics.gram_CC) * (2.0 / statistics.num_rows)
    if not scheme.foldable:
        return [
            _solve([_Layer.of(layer, statistics, gram_CC)], statistics.num_rows, scheme)[0]
            for layer in layers
        ]
    together = [_Layer.of(layer, statistics, gram_CC) for layer in layers]
    magnitude_C, _ = _sizes(statistics)
    if scale_of_input_C is not None:
        magnitude_C = _shared(magnitude_C, scale_of_input_C)
        if (scale_of_input_C == scale_of_input_C[0]).all():
            # They share nothing, and must not depend on which of them are solved at once.
            return [
                _solve([layer], statistics.num_rows, scheme, magnitude_C)[0] for layer in together
            ]
    if len({layer.scale_dtype for layer in layers}) > 1:
        stored = ", ".join(f"{layer.name} in {layer.scale_dtype}" for layer in layers)
        raise SchemeError(
            f"one vector of input scales cannot be stored in several dtypes: {stored}; give these "
            "layers one dtype, or leave foldable out"
        )
    return _solve(together, statistics.num_rows, scheme, magnitude_C)


def _solve(
    layers: Sequence[_Layer],
    num_rows: int,
    scheme: AWQScheme,
    magnitude_C: Float32 | None = None,
) -> list[SolveResult]:
    """Quantize layers with the exponent that has the least loss in all of them together.

    Args:
        magnitude_C: of the inputs, for scales that all layers share; None for the layer's own.
    """

    def attempt(ratio: float, search: bool) -> list[_Attempt]:
        made = []
        for layer in layers:
            if magnitude_C is None:
                scale_C = _input_scales(layer.magnitude_C, ratio)
            else:
                scale_C = _input_scales(magnitude_C, ratio)[layer.input_of_row]
            made.append(_quantized(layer, scale_C, scheme.group_size, search))
        return made

    best = attempt(0.0, search=False)
    rtn_losses = [one.loss for one in best]
    loss, best_ratio = _total(best), 0.0
    kept: Literal["awq", "rtn"] = "rtn"
    first = 0 if scheme.clip_search else 1
    last = scheme.num_grid_points
    if magnitude_C is not None and (magnitude_C == magnitude_C[0]).all():
        last = 0  # equal scales change nothing
    for step in range(first, last + 1):
        ratio = step / scheme.num_grid_points
        candidate = attempt(ratio, scheme.clip_search)
        if _total(candidate) < loss:
            best, loss, best_ratio, kept = candidate, _total(candidate), ratio, "awq"
    reason = "no input scale or clipping lowered the output error"
    if kept == "awq":
        reason = f"input scales of magnitude^{best_ratio:.2f} had the lowest output error"
        if magnitude_C is not None:
            reason += f" of the {len(layers)} layers of this input"
            if last == 0:
                reason = "no input scales that can be folded; clipping lowered the output error"
    return [
        _result(layer, chosen, rtn_loss, scheme, num_rows, best_ratio, kept, reason)
        for layer, chosen, rtn_loss in zip(layers, best, rtn_losses, strict=True)
    ]


def _total(attempts: Sequence[_Attempt]) -> float:
    return sum(one.loss for one in attempts)


def _quantized(layer: _Layer, scale_C: Float32, group_size: int, search: bool) -> _Attempt:
    scale_dtype = layer.problem.scale_dtype
    scale_C = scale_C.astype(scale_dtype).astype(np.float32)
    codes_CR, scale_GR, zero_GR, loss = _attempt(
        layer.weight_CR,
        jnp.asarray(scale_C),
        jnp.asarray(layer.energy_C),
        jnp.asarray(energy_with_unseen(layer.energy_C, layer.energy_C == 0)),
        layer.gram_CC,
        group_size=group_size,
        search=search,
        scale_dtype=scale_dtype,
        together=_all_groups_together(),
    )
    return _Attempt(codes_CR, scale_GR, zero_GR, scale_C, max(float(loss), 0.0))


def _result(
    layer: _Layer,
    chosen: _Attempt,
    rtn_loss: float,
    scheme: AWQScheme,
    num_rows: int,
    ratio: float,
    kept: Literal["awq", "rtn"],
    reason: str,
) -> SolveResult:
    codes_CR, scale_GR, zero_GR = map(
        np.asarray, (chosen.codes_CR, chosen.scale_GR, chosen.zero_GR)
    )
    weight_RC = layer.weight_RC
    weight = GroupedWeight(
        np.ascontiguousarray(codes_CR.T),
        np.ascontiguousarray(scale_GR.T),
        np.ascontiguousarray(zero_GR.T).astype(np.uint8),
        contiguous_groups(weight_RC.shape[1], scheme.group_size),
        chosen.input_scale_C,
    )
    return SolveResult(
        weight,
        SolveReport(
            weight_error=weight_error(weight_RC, weight.dequantize()),
            output_error=chosen.loss,
            rtn_output_error=rtn_loss,
            kept=kept,
            reason=reason,
            rtn_rows=weight_RC.shape[0] if kept == "rtn" else 0,
            dead_inputs=int(np.sum(layer.energy_C == 0)),
            faint_inputs=count_faint(layer.energy_C),
            num_rows=num_rows,
            ratio=ratio,
        ),
    )


def _sizes(statistics: CalibrationStatistics) -> tuple[Float32, Float32]:
    """Each input's magnitude, and twice its mean square."""
    if isinstance(statistics, HessianSum):
        energy_C = np.float32(2 / statistics.num_rows) * statistics.diagonal()
        return np.sqrt(energy_C / 2), energy_C
    energy_C = np.float32(2 / statistics.num_rows) * statistics.sum_square_C
    return statistics.sum_abs_C / np.float32(statistics.num_rows), energy_C


def _shared(magnitude_C: Float32, scale_of_input_C: NDArray[np.intp]) -> Float32:
    """Of each input, the mean magnitude of all that share its scale."""
    total = np.bincount(scale_of_input_C, magnitude_C)
    count = np.maximum(np.bincount(scale_of_input_C), 1)
    mean_C: Float32 = (total / count).astype(np.float32)[scale_of_input_C]
    return mean_C


def _spread(statistics: CalibrationStatistics, input_of_row: NDArray[np.intp]) -> MagnitudeSum:
    """Input magnitudes by stored row; a Hessian gives them in root mean square."""
    if isinstance(statistics, HessianSum):
        square_C = statistics.diagonal()
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
