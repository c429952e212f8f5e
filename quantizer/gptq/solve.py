"""GPTQ of whole weights, in fixed slices of output channels, and the report of each weight.

The steps for layers of one input: factor their Hessian (`quantizer.gptq.factor`), find each
slice's grid from the weights as given (`quantizer.qparams`), solve the slices two at a time
(`quantizer.gptq.column_loop`), and join a weight's slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from quantizer.gptq.column_loop import Columns, SolvedSlice, round_slice, solve_slice
from quantizer.gptq.factor import Factor, arrange, factorize, factorize_shifted
from quantizer.gptq.refine import damped_hessian, refine_slice
from quantizer.hessian import HessianSum, energy_with_unseen
from quantizer.problem import LayerProblem, RowGroups
from quantizer.qparams import contiguous_groups, find_grid
from quantizer.result import Float32, GroupedWeight, SolveReport, SolveResult, relative_error
from quantizer.schemes import GPTQScheme

_BAND = 32
_LARGEST_SLICE = 512
_LARGEST_WIDE_SLICE = 256
_WIDE = 1024
_LARGEST_SLICE_ON_GPU = 16384
_SLICE_STEP = 32
# While one slice is in its column loop on one core, another's products keep the rest busy.
_CONCURRENT_SLICES = 2


@dataclass(frozen=True, slots=True)
class Grid:
    """Scales and zero points (whole), [out_features, groups], and the group of each input."""

    scale_RG: Float32
    zero_RG: Float32
    group_C: NDArray[np.int32]


def row_slices(out_features: int, in_features: int) -> list[tuple[int, int]]:
    """The fixed slices [a, b) of output channels that are solved independently.

    They depend on the type of machine and the weight's shape alone: a product's rounding depends
    on its shape, and any worker that solves a slice must get the same bits. On a CPU a slice's
    panel stays in cache, two slices take less memory than the Hessian, and all are of about one
    size; a GPU is fastest with large ones.
    """
    if jax.default_backend() != "cpu":
        largest = _LARGEST_SLICE_ON_GPU
    else:
        largest = _LARGEST_WIDE_SLICE if in_features > _WIDE else _LARGEST_SLICE
    count = -(-out_features // largest)
    size = -(-out_features // (count * _SLICE_STEP)) * _SLICE_STEP
    return [(a, min(a + size, out_features)) for a in range(0, out_features, size)]


_Blocks = tuple[tuple[Array, ...], ...]


@dataclass(frozen=True, slots=True)
class SharedInput:
    """What solving needs of one input, for all layers that share it.

    Attributes:
        factor: of the Hessian; None if no damping made it definite: rows are rounded to nearest.
        damped: the damped Hessian's blocks that refinement reads; empty if nothing is refined.
        energy_C: what a squared rounding error costs at each input, float32. GPTQ corrects later
            columns for an error at column k, which then costs its pivot D_k and not the diagonal
            H_kk. Without a factor nothing is corrected. An input that calibration never saw costs
            what the others do on average: it may well be used by other text.
    """

    hessian: HessianSum
    scheme: GPTQScheme
    factor: Factor | None
    damped: _Blocks
    energy_C: Float32


def share_input(hessian: HessianSum, scheme: GPTQScheme) -> SharedInput:
    """Factor the Hessian of an input, once for all of its layers."""
    factor = factorize(
        jnp.asarray(hessian.gram_CC),
        hessian.num_rows,
        hessian_damping=scheme.hessian_damping,
        activation_order=scheme.activation_order,
    )
    damped: _Blocks = ()
    energy_C: Float32 = hessian.diagonal() * np.float32(2 / hessian.num_rows)
    dead_C = energy_C == 0
    if factor is not None:
        pivot_C = np.empty(factor.order_C.shape[0], np.float32)
        pivot_C[np.asarray(factor.order_C)] = np.asarray(factor.pivot_C)
        energy_C, dead_C = pivot_C[: energy_C.shape[0]], factor.dead_C
        if scheme.refinement_sweeps:
            rows = jnp.float32(hessian.num_rows)
            damped = damped_hessian(jnp.asarray(hessian.gram_CC), rows, factor.shift)
    return SharedInput(hessian, scheme, factor, damped, energy_with_unseen(energy_C, dead_C))


def grid_of(weight_RC: Float32, energy_RC: Float32, scheme: GPTQScheme, scale_dtype: str) -> Grid:
    """The scheme's grid over contiguous groups.

    Args:
        energy_RC: weight of each squared error, [1 or out_features, in_features].
    """
    parts = [
        _find_grid(
            jnp.asarray(weight_RC[a:b].T),
            jnp.asarray(energy_RC[a:b].T if len(energy_RC) > 1 else energy_RC.T),
            scheme,
            scale_dtype,
        )
        for a, b in row_slices(*weight_RC.shape)
    ]
    return Grid(
        np.concatenate([np.asarray(scale_GR).T for scale_GR, _ in parts]),
        np.concatenate([np.asarray(zero_GR).T for _, zero_GR in parts]),
        contiguous_groups(weight_RC.shape[1], scheme.group_size),
    )


def _find_grid(
    weight_CR: Array, energy_CR: Array, scheme: GPTQScheme, scale_dtype: str
) -> tuple[Array, Array]:
    return find_grid(
        weight_CR,
        energy_CR,
        weight_bits=scheme.weight_bits,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        search=scheme.scale_search,
        scale_dtype=scale_dtype,
    )


@dataclass(frozen=True, slots=True)
class SolvedRows:
    """One solved row slice, in plain arrays that may be sent to another process.

    Attributes:
        damping: that was needed; None if none made H definite.
        dead_inputs: how many inputs were zero in all of calibration.
        num_rows: calibration rows (tokens).
    """

    solved: SolvedSlice
    grid: Grid
    damping: float | None
    dead_inputs: int
    num_rows: int


def solve_on_grid(weight_RC: Float32, shared: SharedInput, grid: Grid) -> SolvedRows:
    """Solve one slice of output channels on a given grid."""
    hessian, factor = shared.hessian, shared.factor
    columns = Columns(
        jnp.asarray(weight_RC.T),
        jnp.asarray(grid.group_C),
        jnp.asarray(grid.scale_RG.T),
        jnp.asarray(grid.zero_RG.T),
    )
    if factor is None:
        hessian_CC = jnp.asarray(hessian.gram_CC) * (2.0 / hessian.num_rows)
        solved = round_slice(columns, hessian_CC, weight_bits=shared.scheme.weight_bits)
    else:
        solved = _solve_columns(columns, factor, shared.damped, shared.scheme)
    return SolvedRows(
        solved=jax.device_get(solved),
        grid=grid,
        damping=None if factor is None else factor.damping,
        dead_inputs=int(np.sum(hessian.diagonal() == 0)),
        num_rows=hessian.num_rows,
    )


def _solve_columns(
    columns: Columns, factor: Factor, damped: _Blocks, scheme: GPTQScheme
) -> SolvedSlice:
    bits, sweeps = scheme.weight_bits, scheme.refinement_sweeps
    solved = solve_slice(columns, factor, weight_bits=bits)
    if not sweeps:
        return solved
    return refine_slice(solved, columns, factor, damped, weight_bits=bits, sweeps=sweeps)


def cut_rows(layer: LayerProblem) -> list[LayerProblem]:
    """The layer's row slices, in order."""
    bounds = row_slices(*layer.weight_RC.shape)
    return [replace(layer, weight_RC=layer.weight_RC[a:b]) for a, b in bounds]


def solve_slices(slices: Sequence[LayerProblem], shared: SharedInput) -> list[SolvedRows]:
    """Solve row slices, of one layer or of several, that share an input."""

    def solve_rows(rows: LayerProblem) -> SolvedRows:
        grid = grid_of(rows.weight_RC, shared.energy_C[None], shared.scheme, rows.scale_dtype)
        return solve_on_grid(rows.weight_RC, shared, grid)

    with ThreadPoolExecutor(_CONCURRENT_SLICES) as pool:
        return list(pool.map(solve_rows, slices))


def join_slices(weight_RC: Float32, parts: Sequence[SolvedRows], scheme: GPTQScheme) -> SolveResult:
    """A weight's result from all its slices, in order."""
    grouped = GroupedWeight(
        _transposed([np.asarray(part.solved.codes_CR) for part in parts]),
        np.concatenate([part.grid.scale_RG for part in parts]),
        np.concatenate([part.grid.zero_RG for part in parts]).astype(np.uint8),
        parts[0].grid.group_C,
    )
    return SolveResult(grouped, _report(weight_RC, parts, scheme))


def solve_in_row_groups(
    layer: LayerProblem, row_groups: RowGroups, shared: SharedInput
) -> SolveResult:
    """Solve the matrix with grids that lie along the rows of its stored matrix.

    Grids are static, so that output channels need only be solved apart where they map inputs to
    groups in different ways.

    Returns:
        The stored matrix, with groups by row; and the report of the weight matrix.
    """
    weight_RC = layer.weight_RC
    energy_RC = np.broadcast_to(shared.energy_C, weight_RC.shape)
    stored = grid_of(
        np.ascontiguousarray(row_groups.to_stored(weight_RC)),
        np.ascontiguousarray(row_groups.to_stored(energy_RC)),
        shared.scheme,
        layer.scale_dtype,
    )
    scale, zero = stored.scale_RG.ravel(), stored.zero_RG.ravel()
    codes_RC = np.empty(weight_RC.shape, np.uint8)
    parts: list[SolvedRows] = []
    for channels, group_C, cells in row_groups.patterns(stored.group_C):
        for a, b in row_slices(len(channels), weight_RC.shape[1]):
            grid = Grid(scale[cells[a:b]], zero[cells[a:b]], group_C)
            part = solve_on_grid(weight_RC[channels[a:b]], shared, grid)
            codes_RC[channels[a:b]] = part.solved.codes_CR.T
            parts.append(part)
    grouped = GroupedWeight(
        np.ascontiguousarray(row_groups.to_stored(codes_RC)),
        stored.scale_RG,
        stored.zero_RG.astype(np.uint8),
        stored.group_C,
    )
    return SolveResult(grouped, _report(weight_RC, parts, shared.scheme))


def _transposed(codes: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Codes [in_features, slice] of all slices as one [out_features, in_features]."""
    codes_RC = np.empty((sum(part.shape[1] for part in codes), codes[0].shape[0]), np.uint8)
    a = 0
    for codes_CR in codes:
        b = a + codes_CR.shape[1]
        # In bands that stay in cache: a plain transposition misses it at every byte.
        for band in range(0, codes_CR.shape[0], _BAND):
            codes_RC[a:b, band : band + _BAND] = codes_CR[band : band + _BAND].T
        a = b
    return codes_RC


def _report(weight_RC: Float32, parts: Sequence[SolvedRows], scheme: GPTQScheme) -> SolveReport:
    """The report of one weight, from all its slices."""
    damping = parts[0].damping

    def total(field: str) -> float:
        return float(sum(np.sum(getattr(part.solved, field), dtype=np.float64) for part in parts))

    weight_energy_R = np.einsum("rc,rc->r", weight_RC, weight_RC)
    rows = sum(part.solved.loss_R.shape[0] for part in parts)
    rtn_rows = int(total("rtn_kept_R"))
    if damping is None:
        reason = "the Hessian stayed indefinite at a damping of 1: rounded to nearest"
    else:
        reason = (
            f"gptq had the lower output error in {rows - rtn_rows} of {rows} output channels, "
            f"round-to-nearest in {rtn_rows}"
        )
        if damping > scheme.hessian_damping:
            reason += (
                f"; damping was raised from {scheme.hessian_damping:g} to {damping:g}, "
                "where the Hessian could be factored"
            )
    return SolveReport(
        weight_error=relative_error(
            total("weight_error_R"), float(np.sum(weight_energy_R, dtype=np.float64))
        ),
        output_error=total("loss_R"),
        rtn_output_error=total("rtn_loss_R"),
        kept="gptq" if rtn_rows == 0 else "rtn" if rtn_rows == rows else "gptq+rtn",
        reason=reason,
        rtn_rows=rtn_rows,
        damping=damping,
        dead_inputs=parts[0].dead_inputs,
        num_rows=parts[0].num_rows,
    )


def compile_solver(
    out_features: int, in_features: int, scheme: GPTQScheme, *, scale_dtype: str
) -> None:
    """Compile ahead what solving weights of this shape runs; nothing is computed."""
    number, gram_CC = _shape(), _shape(in_features, in_features)
    hessian_CC, order_C, _, mean = arrange(gram_CC, number, scheme.activation_order)
    alive_C = np.zeros(in_features, bool)
    factor = Factor(*factorize_shifted(hessian_CC, mean), order_C, alive_C, number, 0.0)
    damped = damped_hessian(gram_CC, number, number) if scheme.refinement_sweeps else ()
    for height in sorted({b - a for a, b in row_slices(out_features, in_features)}):
        weight_CR, energy_C1 = _shape(in_features, height), _shape(in_features, 1)
        grid = _find_grid(weight_CR, energy_C1, scheme, scale_dtype)
        columns = Columns(weight_CR, _shape(in_features, dtype=jnp.int32), *grid)
        _solve_columns(columns, factor, damped, scheme)


def _shape(*shape: int, dtype: Any = jnp.float32) -> Any:
    """Stands for an array when a program is compiled ahead."""
    return jax.ShapeDtypeStruct(shape, dtype)
