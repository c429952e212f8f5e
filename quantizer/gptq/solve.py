"""GPTQ of whole weights, in fixed slices of output channels, and the report of each weight.

The steps for layers of one input: factor their Hessian (`quantizer.gptq.factor`), find each
slice's grid from the weights as given (`quantizer.qparams`), solve the slices two at a time
(`quantizer.gptq.path`), and join a weight's slices. On a GPU slices are stacked first.
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

from quantizer.gptq.bands import pack, split, stacked
from quantizer.gptq.column_loop import Columns, round_slice
from quantizer.gptq.factor import Blocks, Factor, arrange, factorize
from quantizer.gptq.path import Path, path_of
from quantizer.gptq.refit import Refit
from quantizer.gptq.solved_rows import Grid, SolvedRows, report_of
from quantizer.hessian import HessianSum, count_faint, energy_with_unseen
from quantizer.problem import LayerProblem, RowGroups
from quantizer.qparams import contiguous_groups, find_grid
from quantizer.result import (
    Float32,
    GroupedWeight,
    SolveResult,
)
from quantizer.schemes import GPTQScheme

_LARGEST_SLICE = 512
_LARGEST_WIDE_SLICE = 256
_WIDE = 1024
_SLICE_STEP = 32
# While one slice is in its column loop on one core, another's products keep the rest busy.
_CONCURRENT_SLICES = 2


def this_path() -> Path:
    """How this machine solves."""
    return path_of(jax.default_backend())


def row_slices(out_features: int, in_features: int) -> list[tuple[int, int]]:
    """The fixed slices [a, b) of output channels that are solved independently.

    They depend on the type of machine and the weight's shape alone: a product's rounding depends
    on its shape, and any worker that solves a slice must get the same bits. On a CPU a slice's
    panel stays in cache, two slices take less memory than the Hessian, and all are of about one
    size; for GPUs see `path.BAND`.
    """
    band = this_path().band
    largest = band or (_LARGEST_WIDE_SLICE if in_features > _WIDE else _LARGEST_SLICE)
    count = -(-out_features // largest)
    size = -(-out_features // (count * _SLICE_STEP)) * _SLICE_STEP
    return [(a, min(a + size, out_features)) for a in range(0, out_features, size)]


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
        path: how it was factored, and all of it is solved.
        dead_inputs, faint_inputs: as in `SolvedRows`.
    """

    hessian: HessianSum
    scheme: GPTQScheme
    factor: Factor | None
    damped: Blocks
    energy_C: Float32
    path: Path
    dead_inputs: int
    faint_inputs: int

    def on_device(self, device: jax.Device) -> SharedInput:
        """The same on another device; the undamped Hessian only if solving reads it."""
        factor, hessian = self.factor, self.hessian
        if factor is None or self.scheme.scale_refit:
            hessian = replace(hessian, gram_CC=jax.device_put(hessian.gram_CC, device))
        if factor is not None:
            factor = factor.on_device(device)
        damped: Blocks = jax.device_put(self.damped, device)
        return replace(self, hessian=hessian, factor=factor, damped=damped)


def share_input(hessian: HessianSum, scheme: GPTQScheme) -> SharedInput:
    """Shrink the correlations of an input, if the scheme says so, and factor its Hessian."""
    path = this_path()
    if scheme.correlation_shrinkage:
        hessian = hessian.shrunk(scheme.correlation_shrinkage)
    factor = factorize(
        jnp.asarray(hessian.gram_CC),
        hessian.num_rows,
        hessian_damping=scheme.hessian_damping,
        activation_order=scheme.activation_order,
        shifted=path.factorize,
    )
    damped: Blocks = ()
    diagonal_C = hessian.diagonal()
    energy_C: Float32 = diagonal_C * np.float32(2 / hessian.num_rows)
    dead_C = energy_C == 0
    if factor is not None:
        pivot_C = np.empty(factor.order_C.shape[0], np.float32)
        pivot_C[np.asarray(factor.order_C)] = np.asarray(factor.pivot_C)
        energy_C, dead_C = pivot_C[: energy_C.shape[0]], factor.dead_C
        if scheme.refinement_sweeps:
            rows = jnp.float32(hessian.num_rows)
            damped = path.damp(jnp.asarray(hessian.gram_CC), rows, factor.shift)
    return SharedInput(
        hessian,
        scheme,
        factor,
        damped,
        energy_with_unseen(energy_C, dead_C),
        path,
        dead_inputs=int(np.sum(diagonal_C == 0)),
        faint_inputs=count_faint(diagonal_C),
    )


def grid_of(weight_RC: Float32, energy_RC: Float32, scheme: GPTQScheme, scale_dtype: str) -> Grid:
    """The scheme's grid over contiguous groups.

    Args:
        energy_RC: weight of each squared error, [1 or out_features, in_features].
    """
    band = this_path().band

    def of_rows(a: int, b: int) -> tuple[Array, Array]:
        energy_CR = stacked([energy_RC[a:b]], band) if len(energy_RC) > 1 else energy_RC.T
        weight_CR = jnp.asarray(stacked([weight_RC[a:b]], band))
        return _find_grid(weight_CR, jnp.asarray(energy_CR), scheme, scale_dtype)

    bounds = row_slices(*weight_RC.shape)
    parts = [(b - a, *of_rows(a, b)) for a, b in bounds]
    return Grid(
        np.concatenate([np.asarray(scale_GR).T[:height] for height, scale_GR, _ in parts]),
        np.concatenate([np.asarray(zero_GR).T[:height] for height, _, zero_GR in parts]),
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
        together=this_path().band is not None,
    )


def solve_on_grid(
    weight_RC: Float32, shared: SharedInput, grid: Grid, refit: Refit | None = None
) -> SolvedRows:
    """Solve one slice of output channels on a given grid, whose scales may be refitted."""
    band = shared.path.band
    columns = Columns(
        jnp.asarray(stacked([weight_RC], band)),
        jnp.asarray(grid.group_C),
        jnp.asarray(stacked([grid.scale_RG], band, filling=1.0)),
        jnp.asarray(stacked([grid.zero_RG], band)),
    )
    return _solve_columns(columns, shared, [len(weight_RC)], refit)[0]


def _refit(shared: SharedInput, group_size: int, scale_dtype: str) -> Refit | None:
    """For slices of this input with such groups, if the scheme has their scales refitted."""
    if not shared.scheme.scale_refit:
        return None
    gram_CC = jnp.asarray(shared.hessian.gram_CC)
    num_rows = jnp.float32(shared.hessian.num_rows)
    return Refit(gram_CC, num_rows, _size_of_groups(group_size, len(gram_CC)), scale_dtype)


def _size_of_groups(group_size: int, in_features: int) -> int:
    return in_features if group_size == -1 else group_size


def _solve_columns(
    columns: Columns,
    shared: SharedInput,
    heights: Sequence[int],
    refit: Refit | None,
) -> list[SolvedRows]:
    """Solve a stack of slices of these heights."""
    hessian, scheme, factor = shared.hessian, shared.scheme, shared.factor
    if factor is None:
        hessian_CC = jnp.asarray(hessian.gram_CC) * (2.0 / hessian.num_rows)
        solved = round_slice(columns, hessian_CC, weight_bits=scheme.weight_bits)
    else:
        solved, scale_GR = shared.path.solve_columns(columns, factor, shared.damped, scheme, refit)
        columns = columns.with_scales(scale_GR)
    group_C, scale_GR, zero_GR = jax.device_get(columns[1:])
    ends = np.cumsum(heights)
    return [
        SolvedRows(
            solved=part,
            grid=Grid(scale_GR.T[b - height : b], zero_GR.T[b - height : b], group_C),
            damping=None if factor is None else factor.damping,
            dead_inputs=shared.dead_inputs,
            num_rows=hessian.num_rows,
            faint_inputs=shared.faint_inputs,
        )
        for part, b, height in zip(
            split(jax.device_get(solved), heights), ends, heights, strict=True
        )
    ]


def cut_rows(layer: LayerProblem) -> list[LayerProblem]:
    """The layer's row slices, in order."""
    bounds = row_slices(*layer.weight_RC.shape)
    return [replace(layer, weight_RC=layer.weight_RC[a:b]) for a, b in bounds]


def solve_slices(
    slices: Sequence[LayerProblem], shared: SharedInput, devices: Sequence[jax.Device] = ()
) -> list[SolvedRows]:
    """Solve row slices, of one layer or of several, that share an input.

    Args:
        devices: those to solve on, in turn, each with a copy of what the slices share, which is on
            the first; none for where JAX computes anyway.
    """
    path, scheme = shared.path, shared.scheme
    group_C = contiguous_groups(len(shared.energy_C), scheme.group_size)
    packs = pack(slices, path.band)
    # No more than there is work for.
    devices = devices[: len(packs)]
    here = jax.default_device.value  # which threads of a pool do not know
    copies = [shared, *(shared.on_device(device) for device in devices[1:])]

    def solve_stack(number: int, members: Sequence[int]) -> list[SolvedRows]:
        place = number % len(copies)
        rows = [slices[number] for number in members]
        weights = [one.weight_RC for one in rows]
        with jax.default_device(devices[place] if place else here):
            weight_CR = jnp.asarray(stacked(weights, path.band))
            energy_C1 = jnp.asarray(shared.energy_C[:, None])
            grid = _find_grid(weight_CR, energy_C1, scheme, rows[0].scale_dtype)
            columns = Columns(weight_CR, jnp.asarray(group_C), *grid)
            heights = [len(weight_RC) for weight_RC in weights]
            refit = _refit(copies[place], scheme.group_size, rows[0].scale_dtype)
            return _solve_columns(columns, copies[place], heights, refit)

    with ThreadPoolExecutor(_CONCURRENT_SLICES * len(copies)) as pool:
        solved = list(pool.map(solve_stack, range(len(packs)), packs))
    by_number = {
        number: part
        for members, parts in zip(packs, solved, strict=True)
        for number, part in zip(members, parts, strict=True)
    }
    return [by_number[number] for number in range(len(slices))]


def solve_in_row_groups(
    layer: LayerProblem, row_groups: RowGroups, shared: SharedInput
) -> SolveResult:
    """Solve the matrix with grids that lie along the rows of its stored matrix.

    Grids are static, so that output channels need only be solved apart where they map inputs to
    groups in different ways. Scales are refitted where a group lies within one output channel.

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
    patterns = row_groups.patterns(stored.group_C)
    channels_of_cell = np.bincount(np.concatenate([cells.ravel() for *_, cells in patterns]))
    unfitted = 0
    for channels, group_C, cells in patterns:
        size = int(np.count_nonzero(group_C == 0))
        in_runs = np.array_equal(group_C, contiguous_groups(len(group_C), size))
        if in_runs and (channels_of_cell[cells] == 1).all():
            refit = _refit(shared, size, layer.scale_dtype)
        else:
            refit = None
            unfitted += len(channels) if shared.scheme.scale_refit else 0
        for a, b in row_slices(len(channels), weight_RC.shape[1]):
            grid = Grid(scale[cells[a:b]], zero[cells[a:b]], group_C)
            part = solve_on_grid(weight_RC[channels[a:b]], shared, grid, refit)
            codes_RC[channels[a:b]] = part.solved.codes_CR.T
            if refit is not None:
                scale[cells[a:b]] = part.grid.scale_RG
            parts.append(part)
    grouped = GroupedWeight(
        np.ascontiguousarray(row_groups.to_stored(codes_RC)),
        scale.reshape(stored.scale_RG.shape),
        stored.zero_RG.astype(np.uint8),
        stored.group_C,
    )
    return SolveResult(grouped, report_of(weight_RC, parts, shared.scheme, unfitted=unfitted))


def compile_solver(
    out_features: int, in_features: int, scheme: GPTQScheme, *, scale_dtype: str
) -> None:
    """Compile ahead what solving weights of this shape runs; nothing is computed."""
    path = this_path()
    number, gram_CC = _shape(), _shape(in_features, in_features)
    hessian_CC, order_C, _, mean = arrange(gram_CC, number, scheme.activation_order)
    alive_C = np.zeros(in_features, bool)
    factor = Factor(*path.factorize(hessian_CC, mean), order_C, alive_C, number, 0.0)
    damped = path.damp(gram_CC, number, number) if scheme.refinement_sweeps else ()
    refit = None
    if scheme.scale_refit:
        size = _size_of_groups(scheme.group_size, in_features)
        refit = Refit(gram_CC, number, size, scale_dtype)
    slices = row_slices(out_features, in_features)
    for height in sorted({path.band or b - a for a, b in slices}):
        weight_CR, energy_C1 = _shape(in_features, height), _shape(in_features, 1)
        grid = _find_grid(weight_CR, energy_C1, scheme, scale_dtype)
        columns = Columns(weight_CR, _shape(in_features, dtype=jnp.int32), *grid)
        path.solve_columns(columns, factor, damped, scheme, refit)


def _shape(*shape: int, dtype: Any = jnp.float32) -> Any:
    """Stands for an array when a program is compiled ahead."""
    return jax.ShapeDtypeStruct(shape, dtype)
