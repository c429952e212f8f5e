"""The one door to the solvers: validate a layer once, then solve it by its scheme."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import NoneType

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (teaches NumPy the name "bfloat16")
import numpy as np
from numpy.typing import ArrayLike, NDArray

from quantizer.awq import solve_awq
from quantizer.errors import CalibrationError, SchemeError, WeightError
from quantizer.gptq.drift import Drift, correct_layers
from quantizer.gptq.solve import cut_rows, share_input, solve_in_row_groups, solve_slices
from quantizer.gptq.solved_rows import SolvedRows, join_slices
from quantizer.hessian import CalibrationStatistics, HessianSum, MagnitudeSum
from quantizer.problem import LayerProblem, RowGroups
from quantizer.result import DriftJudgement, Float32, SolveReport, SolveResult
from quantizer.rtn import solve_float8, solve_int
from quantizer.schemes import AWQScheme, Float8Scheme, GPTQScheme, Int4Scheme, Int8Scheme, Scheme

# Squares of larger weights, times the largest input energy, overflow float32.
_LARGEST_WEIGHT = 1e8


def solve(
    weight: ArrayLike,
    statistics: CalibrationStatistics | None,
    scheme: Scheme,
    *,
    drift: Drift | None = None,
    scale_dtype: str = "float32",
    row_groups: RowGroups | None = None,
    name: str = "weight",
) -> SolveResult:
    """Quantize one weight matrix.

    Args:
        weight: [out_features, in_features], any float dtype.
        statistics: of the layer's inputs. gptq needs a HessianSum, float8 a MagnitudeSum, awq
            either; int8 and int4 take None or either.
        drift: for `GPTQScheme.drift_correction` above 0, which a DriftSum corrects by just that
            share, and a JudgedDrift by the share up to it that serves rows held back best.
        scale_dtype, row_groups, name: as in `LayerProblem`.

    Returns:
        The quantized weight and its report. With gptq, int8 and int4, solving `weight[a:b]`
        for each (a, b) of `row_slices` gives those rows of the whole, bit for bit; awq's input
        scales and float8's scale are one choice for all rows.

    Raises:
        WeightError, CalibrationError, SchemeError: bad input; the message names the layer.
    """
    layer = check_layer(weight, scheme, scale_dtype=scale_dtype, row_groups=row_groups, name=name)
    return solve_problems([layer], statistics, drift=drift)[0]


def solve_stack(
    weights: Sequence[ArrayLike],
    statistics: CalibrationStatistics | None,
    scheme: Scheme,
    *,
    drift: Drift | None = None,
    scale_dtype: str = "float32",
    names: Sequence[str] | None = None,
) -> list[SolveResult]:
    """Quantize several layers of one input (q, k and v; gate and up) with one factorization.

    Each result equals `solve` of that layer alone, bit for bit, unless the scheme is a foldable
    awq: that gives all of them the same input scales. Arguments and errors as in `solve`.
    """
    names = [f"weight {i}" for i in range(len(weights))] if names is None else names
    layers = [
        check_layer(weight, scheme, scale_dtype=scale_dtype, name=name)
        for weight, name in zip(weights, names, strict=True)
    ]
    return solve_problems(layers, statistics, drift=drift)


def solve_problems(
    layers: Sequence[LayerProblem],
    statistics: CalibrationStatistics | None,
    *,
    drift: Drift | None = None,
    scale_of_input_C: NDArray[np.intp] | None = None,
    devices: Sequence[jax.Device] = (),
) -> list[SolveResult]:
    """Solve checked layers of one input and one scheme; gptq factors their Hessian once.

    Args:
        scale_of_input_C: which inputs share a scale, for `solve_awq`.
        devices: those that gptq may solve on, side by side; the Hessian is on the first.

    Raises:
        UnusableStatisticsError: the statistics cannot serve these layers.
        CalibrationError: the scheme needs statistics of another type, or a drift.
    """
    if not layers:
        return []
    scheme = layers[0].scheme
    _check_statistics(layers, statistics)
    match scheme:
        case GPTQScheme():
            assert isinstance(statistics, HessianSum)
            return _solve_gptq(layers, statistics, scheme, drift, devices)
        case AWQScheme():
            assert statistics is not None
            return solve_awq(layers, statistics, scheme, scale_of_input_C)
        case Float8Scheme():
            assert isinstance(statistics, MagnitudeSum)
            return [solve_float8(layer.weight_RC, statistics, scheme) for layer in layers]
        case Int8Scheme() | Int4Scheme():
            return [solve_int(layer, statistics, scheme) for layer in layers]


def solve_rows(
    layer: LayerProblem,
    statistics: CalibrationStatistics | None,
    slices: Sequence[int],
    *,
    drift: Drift | None = None,
    devices: Sequence[jax.Device] = (),
) -> list[SolvedRows]:
    """Solve some row slices of a gptq layer without `row_groups`, for `join_slices`.

    Args:
        slices: their numbers in `row_slices`.
        drift: as in `solve`.
        devices: as in `solve_problems`.

    Raises:
        CalibrationError: as `solve_problems`.
    """
    scheme = layer.scheme
    assert isinstance(scheme, GPTQScheme)
    assert layer.row_groups is None
    _check_statistics([layer], statistics)
    assert isinstance(statistics, HessianSum)
    [(corrected, judgement)] = _corrected([layer], statistics, drift, scheme)
    rows = cut_rows(corrected)
    shared = share_input(statistics, scheme)
    solved = solve_slices([rows[number] for number in slices], shared, devices)
    return [replace(one, drift=judgement) for one in solved]


def uncalibrated(report: SolveReport, obstacle: str, out_features: int) -> SolveReport:
    """The report of a layer that was solved without knowledge of its inputs.

    Args:
        obstacle: why it could not be calibrated.
    """
    return replace(
        report,
        output_error=None,
        rtn_output_error=None,
        kept="rtn",
        rtn_rows=out_features,
        num_rows=0,
        reason=f"not calibrated, rounded to nearest: {obstacle}",
    )


def _solve_gptq(
    layers: Sequence[LayerProblem],
    hessian: HessianSum,
    scheme: GPTQScheme,
    drift: Drift | None,
    devices: Sequence[jax.Device],
) -> list[SolveResult]:
    corrected = _corrected(layers, hessian, drift, scheme)
    shared = share_input(hessian, scheme)
    cut = [cut_rows(layer) if layer.row_groups is None else [] for layer, _ in corrected]
    solved = iter(solve_slices([rows for slices in cut for rows in slices], shared, devices))
    results = [
        join_slices(given.weight_RC, [next(solved) for _ in slices], scheme)
        if layer.row_groups is None
        else solve_in_row_groups(layer, layer.row_groups, shared)
        for given, (layer, _), slices in zip(layers, corrected, cut, strict=True)
    ]
    return [
        replace(result, report=replace(result.report, drift=judgement))
        for result, (_, judgement) in zip(results, corrected, strict=True)
    ]


def check_layer(
    weight: ArrayLike,
    scheme: Scheme,
    *,
    scale_dtype: str = "float32",
    row_groups: RowGroups | None = None,
    name: str = "weight",
) -> LayerProblem:
    """Validate a layer. Arguments as in `solve`.

    Raises:
        WeightError: a weight that cannot be quantized, or whose scales `scale_dtype` cannot hold.
        SchemeError: a scheme that does not fit the layer, or an unknown `scale_dtype`.
    """
    weight_RC, largest = _checked_weight(weight, name)
    if not isinstance(scheme, Scheme):
        raise SchemeError(
            f"{name}: {scheme!r} is no scheme; give one such as GPTQScheme(), or "
            "scheme_from_dict(values)"
        )
    in_features = weight_RC.shape[1]
    if isinstance(scheme, GPTQScheme | AWQScheme) and scheme.group_size > in_features:
        raise SchemeError(
            f"{name}: group_size {scheme.group_size} is larger than the layer's {in_features} "
            f"input features; use at most {in_features}, or -1 for one group"
        )
    if scale_dtype not in ("float32", "bfloat16", "float16"):
        raise SchemeError(
            f"{name}: scales are stored in float32, bfloat16 or float16, not {scale_dtype!r}"
        )
    # float8 keeps its scales in float32 whatever is asked.
    if (
        scale_dtype == "float16"
        and not isinstance(scheme, Float8Scheme)
        and largest > float(np.finfo(np.float16).max)
    ):
        raise WeightError(
            f"{name}: the largest weight is {largest:g}, beyond float16; store the scales "
            "in bfloat16 or float32"
        )
    return LayerProblem(weight_RC, scheme, scale_dtype, row_groups, name)


def _checked_weight(weight: ArrayLike, name: str) -> tuple[Float32, float]:
    """The weight as finite float32 [out_features, in_features], and its largest magnitude."""
    try:
        given = np.asarray(weight)
    except ValueError as error:
        raise WeightError(f"{name}: expected a matrix of floats: {error}") from error
    if not jnp.issubdtype(given.dtype, jnp.floating):
        raise WeightError(
            f"{name}: expected a float weight, got {given.dtype}; if the layer is already "
            "quantized, start from its float checkpoint"
        )
    with np.errstate(over="ignore"):  # what overflows becomes infinite, and is refused below
        weight_RC = given.astype(np.float32, copy=False)
    if weight_RC.ndim != 2 or weight_RC.size == 0:
        raise WeightError(
            f"{name}: expected a weight of shape [out_features, in_features], got {weight_RC.shape}"
        )
    # The extremes are not finite if any weight is not, and need no copy.
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
    return weight_RC, largest


_STATISTICS: dict[str, tuple[tuple[type, ...], str]] = {
    "gptq": ((HessianSum,), "a HessianSum"),
    "awq": ((HessianSum, MagnitudeSum), "a HessianSum or a MagnitudeSum"),
    "float8": ((MagnitudeSum,), "a MagnitudeSum (a HessianSum lacks the largest input)"),
    "int8": ((HessianSum, MagnitudeSum, NoneType), "a HessianSum, a MagnitudeSum or None"),
    "int4": ((HessianSum, MagnitudeSum, NoneType), "a HessianSum, a MagnitudeSum or None"),
}
"""The types of statistics that each scheme takes, and how a message names them."""


def _check_statistics(
    layers: Sequence[LayerProblem], statistics: CalibrationStatistics | None
) -> None:
    """Check the statistics once for each width among the layers, in the first one's name."""
    first = layers[0]
    accepted, wanted = _STATISTICS[first.scheme.mode]
    if not isinstance(statistics, accepted):
        raise CalibrationError(
            f"{first.name}: {first.scheme.mode} takes {wanted} of the layer's inputs, got "
            f"{type(statistics).__name__}; a scheme such as int8 needs no calibration"
        )
    if statistics is not None:
        names: dict[int, str] = {}
        for layer in layers:
            names.setdefault(layer.weight_RC.shape[1], layer.name)
        for in_features, name in names.items():
            statistics.check(in_features, name)


def _corrected(
    layers: Sequence[LayerProblem], hessian: HessianSum, drift: Drift | None, scheme: GPTQScheme
) -> list[tuple[LayerProblem, DriftJudgement | None]]:
    """Layers with the weights to approximate: those given, unless the scheme corrects drift."""
    if scheme.drift_correction == 0:
        return [(layer, None) for layer in layers]
    if drift is None:
        raise CalibrationError(
            f"{layers[0].name}: drift_correction is {scheme.drift_correction:g}, but no DriftSum "
            "was given; give DriftSum.of(inputs, quantized_inputs), or set it to 0"
        )
    return correct_layers(
        layers,
        hessian,
        drift,
        strength=scheme.drift_correction,
        hessian_damping=scheme.hessian_damping,
    )
