"""The solvers' door: a weight matrix, what calibration saw and a scheme in; a solution out."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (teaches NumPy the name "bfloat16")
import numpy as np
from numpy.typing import ArrayLike

from quantizer.awq import solve_awq
from quantizer.errors import CalibrationError, SchemeError, WeightError
from quantizer.gptq.drift import DriftSum, correct_target
from quantizer.gptq.solve import factorize_hessian, solve_gptq
from quantizer.hessian import HessianSum, MagnitudeSum
from quantizer.result import Float32, Solution, SolveReport, output_error, weight_error
from quantizer.rtn import round_weight, solve_float8
from quantizer.schemes import (
    AWQScheme,
    Float8Scheme,
    GPTQScheme,
    Int4Scheme,
    Int8Scheme,
    Scheme,
)

CalibrationStatistics = HessianSum | MagnitudeSum

SCALE_DTYPES = ("float32", "bfloat16", "float16")
"""Dtypes that scales may be stored in."""

# Squares of larger weights, weighed by the largest input energy, overflow float32.
_LARGEST_WEIGHT = 1e8


def solve(
    weight: ArrayLike,
    statistics: CalibrationStatistics | None,
    scheme: Scheme,
    *,
    drift: DriftSum | None = None,
    scale_dtype: str = "float32",
    name: str = "weight",
) -> Solution:
    """Quantize one weight matrix.

    Args:
        weight: [out_features, in_features], any float dtype.
        statistics: what calibration saw of the layer's inputs. gptq needs a HessianSum,
            float8 a MagnitudeSum, awq takes either; int8 and int4 take None or either.
        scheme: the wanted format.
        drift: for `GPTQScheme.drift_correction` above 0.
        scale_dtype: dtype in which scales will be stored ("float32", "bfloat16", "float16").
        name: the layer, for messages.

    Returns:
        The quantized weight and its report. With gptq, int8 and int4, solving `weight[a:b]`
        for each (a, b) of `row_slices` gives those rows of the whole, bit for bit; awq's input
        scales and float8's scale are one choice for all rows.

    Raises:
        WeightError, CalibrationError, SchemeError: bad input; the message names the layer.
    """
    weight_RC = check_weight(weight, name)
    check_scheme(scheme, weight_RC.shape[1], name)
    check_scale_dtype(scale_dtype, weight_RC, scheme, name)
    match scheme:
        case GPTQScheme():
            hessian = require_hessian(statistics, weight_RC.shape[1], scheme.mode, name)
            weight_RC = correct_drift(weight_RC, hessian, drift, scheme, name)
            factor = factorize_hessian(hessian, scheme)
            return solve_gptq([weight_RC], factor, hessian, scheme, scale_dtype=scale_dtype)[0]
        case AWQScheme():
            if not isinstance(statistics, CalibrationStatistics):
                raise _missing(name, scheme.mode, "a HessianSum or a MagnitudeSum")
            statistics.check(weight_RC.shape[1], name)
            return solve_awq(weight_RC, statistics, scheme, scale_dtype=scale_dtype)
        case Float8Scheme():
            if not isinstance(statistics, CalibrationStatistics):
                raise _missing(name, scheme.mode, "a MagnitudeSum")
            statistics.check(weight_RC.shape[1], name)
            if not isinstance(statistics, MagnitudeSum):
                raise CalibrationError(
                    f"{name}: float8 needs the largest input, which a Hessian does not hold; "
                    "give MagnitudeSum.of(inputs)"
                )
            return solve_float8(weight_RC, statistics, scheme)
        case Int8Scheme():
            return _round(weight_RC, statistics, 8, -1, scale_dtype, name)
        case Int4Scheme():
            return _round(weight_RC, statistics, 4, scheme.block_size, scale_dtype, name)


def solve_stack(
    weights: Sequence[ArrayLike],
    hessian: HessianSum,
    scheme: GPTQScheme,
    *,
    drift: DriftSum | None = None,
    scale_dtype: str = "float32",
    names: Sequence[str] | None = None,
) -> list[Solution]:
    """Quantize several layers of one input (q, k and v; gate and up) with one factorization.

    Each result equals `solve` of that layer alone, bit for bit. Arguments and errors as there.
    """
    names = [f"weight {i}" for i in range(len(weights))] if names is None else names
    checked = [check_weight(w, n) for w, n in zip(weights, names, strict=True)]
    for weight_RC, name in zip(checked, names, strict=True):
        check_scheme(scheme, weight_RC.shape[1], name)
        if not isinstance(scheme, GPTQScheme):
            raise SchemeError(f"{name}: a stack is solved by a GPTQScheme, not {scheme!r}")
        check_scale_dtype(scale_dtype, weight_RC, scheme, name)
        require_hessian(hessian, weight_RC.shape[1], scheme.mode, name)
    if not checked:
        return []
    factor = factorize_hessian(hessian, scheme)
    targets = [
        correct_drift(weight_RC, hessian, drift, scheme, name)
        for weight_RC, name in zip(checked, names, strict=True)
    ]
    return solve_gptq(targets, factor, hessian, scheme, scale_dtype=scale_dtype)


def _round(
    weight_RC: Float32,
    statistics: CalibrationStatistics | None,
    bits: int,
    block_size: int,
    scale_dtype: str,
    name: str,
) -> Solution:
    weight = round_weight(weight_RC, bits=bits, block_size=block_size, scale_dtype=scale_dtype)
    restored_RC = weight.dequantize()
    loss = None
    if statistics is not None:
        if not isinstance(statistics, CalibrationStatistics):
            raise CalibrationError(
                f"{name}: statistics must be a HessianSum, a MagnitudeSum or None, "
                f"got {type(statistics).__name__}"
            )
        statistics.check(weight_RC.shape[1], name)
        loss = output_error(weight_RC, restored_RC, statistics)
    return Solution(
        weight,
        SolveReport(
            weight_error=weight_error(weight_RC, restored_RC),
            output_error=loss,
            rtn_output_error=loss,
            kept="rtn",
            reason=f"int{bits} rounds to nearest",
            rtn_rows=weight_RC.shape[0],
            num_rows=0 if statistics is None else statistics.num_rows,
        ),
    )


def check_weight(weight: ArrayLike, name: str) -> Float32:
    """The weight as finite float32 [out_features, in_features].

    Raises:
        WeightError: no floats, another rank, no entries, NaN, infinity or beyond float32.
    """
    try:
        given = np.asarray(weight)
    except ValueError as error:
        raise WeightError(f"{name}: expected a matrix of floats: {error}") from error
    if not jnp.issubdtype(given.dtype, jnp.floating):
        raise WeightError(
            f"{name}: expected a float weight, got {given.dtype}; if the layer is already "
            "quantized, start from its float checkpoint"
        )
    with np.errstate(over="ignore"):  # what overflows is infinite, and refused below
        weight_RC = given.astype(np.float32, copy=False)
    if weight_RC.ndim != 2 or weight_RC.size == 0:
        raise WeightError(
            f"{name}: expected a weight of shape [out_features, in_features], got {weight_RC.shape}"
        )
    # One pass and no copy: what is not finite shows in the extremes.
    with np.errstate(invalid="ignore"):
        largest = max(float(weight_RC.max()), -float(weight_RC.min()))
    if not np.isfinite(largest):
        bad = int(np.size(weight_RC) - np.isfinite(weight_RC).sum())
        raise WeightError(
            f"{name}: {bad} of {weight_RC.size} weights are NaN or infinite; "
            "the checkpoint is damaged or was saved in too narrow a dtype"
        )
    if largest > _LARGEST_WEIGHT:
        raise WeightError(
            f"{name}: the largest weight is {largest:g}, too large to solve in float32 "
            f"(at most {_LARGEST_WEIGHT:g}); check the checkpoint, or rescale the layer"
        )
    return weight_RC


def check_scheme(scheme: Scheme, in_features: int, name: str) -> None:
    """Refuse what is no scheme, or a group larger than the layer's inputs.

    Raises:
        SchemeError: with the remedy.
    """
    if not isinstance(scheme, Scheme):
        raise SchemeError(
            f"{name}: {scheme!r} is no scheme; give one such as GPTQScheme(), or "
            "scheme_from_dict(values)"
        )
    if isinstance(scheme, GPTQScheme | AWQScheme) and scheme.group_size > in_features:
        raise SchemeError(
            f"{name}: group_size {scheme.group_size} is larger than the layer's {in_features} "
            f"input features; use at most {in_features}, or -1 for one group"
        )


def check_scale_dtype(scale_dtype: str, weight_RC: Float32, scheme: Scheme, name: str) -> None:
    """Refuse a dtype that cannot hold scales, or not those of this weight.

    Raises:
        SchemeError: an unknown dtype.
        WeightError: weights beyond the dtype's range.
    """
    if scale_dtype not in SCALE_DTYPES:
        raise SchemeError(
            f"{name}: scales are stored in float32, bfloat16 or float16, not {scale_dtype!r}"
        )
    # float8 keeps its scales in float32 whatever is asked.
    if scale_dtype == "float16" and not isinstance(scheme, Float8Scheme):
        largest = float(np.abs(weight_RC).max())
        if largest > float(np.finfo(np.float16).max):
            raise WeightError(
                f"{name}: the largest weight is {largest:g}, beyond float16; store the scales "
                "in bfloat16 or float32"
            )


def _missing(name: str, mode: str, wanted: str) -> CalibrationError:
    return CalibrationError(
        f"{name}: {mode} needs calibration; give {wanted} of the layer's inputs, or a scheme "
        "that needs none, such as int8"
    )


def require_hessian(
    statistics: CalibrationStatistics | None, in_features: int, mode: str, name: str
) -> HessianSum:
    """The statistics as a usable HessianSum.

    Raises:
        CalibrationError: none, of another kind, or unusable.
    """
    if not isinstance(statistics, HessianSum):
        raise _missing(name, mode, "a HessianSum")
    statistics.check(in_features, name)
    return statistics


def correct_drift(
    weight_RC: Float32,
    hessian: HessianSum,
    drift: DriftSum | None,
    scheme: GPTQScheme,
    name: str,
) -> Float32:
    """The weights to aim at, [out_features, in_features]; those given unless the scheme asks.

    Raises:
        CalibrationError: the scheme corrects drift and none was given, or one of other rows.
    """
    if scheme.drift_correction == 0:
        return weight_RC
    if drift is None:
        raise CalibrationError(
            f"{name}: drift_correction is {scheme.drift_correction:g}, but no DriftSum was "
            "given; give DriftSum.of(inputs, quantized_inputs), or set it to 0"
        )
    return correct_target(
        weight_RC,
        hessian,
        drift,
        strength=scheme.drift_correction,
        hessian_damping=scheme.hessian_damping,
        name=name,
    )
