"""GPTQ for kernels that Keras groups otherwise than by the matrix's columns.

Grids live in Keras' layout [columns, rows], groups along the rows; the solver works on the
matrix. Gemma's query (n, d, h) with d summed: rows are (n, d), so a group is a run of d inside
one head, and all heads share one d×d Hessian. Where group_size does not divide d a group spans
two heads; grids are static, so each head is then solved with its own map of inputs to groups.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantizer.gptq.column_loop import SolvedSlice
from quantizer.gptq.drift import DriftSum
from quantizer.gptq.solve import (
    Grid,
    contiguous_groups,
    factorize_hessian,
    gptq_report,
    grid_of,
    row_slices,
    search_energy,
    solve_on_grid,
    to_refine,
)
from quantizer.keras_format.kernel_layout import KernelLayout
from quantizer.result import Float32, GroupedWeight, SolveReport
from quantizer.schemes import GPTQScheme
from quantizer.solver import CalibrationStatistics, check_scheme, correct_drift, require_hessian


def solve_in_keras_groups(
    weight_RC: Float32,
    layout: KernelLayout,
    scheme: GPTQScheme,
    statistics: CalibrationStatistics | None,
    *,
    drift: DriftSum | None,
    scale_dtype: str,
    name: str,
) -> tuple[GroupedWeight, SolveReport]:
    """Solve on the matrix with grids that live in Keras' layout.

    Returns:
        The weight in Keras' layout: codes [columns, rows], scales and zero points
        [columns, groups], g_idx by row; and the report of the matrix.
    """
    check_scheme(scheme, layout.in_features, name)
    hessian = require_hessian(statistics, layout.in_features, scheme.mode, name)
    weight_RC = correct_drift(weight_RC, hessian, drift, scheme, name)
    factor = factorize_hessian(hessian, scheme)
    damped = to_refine(factor, hessian, scheme)

    energy_RC = np.broadcast_to(search_energy(factor, hessian), weight_RC.shape)
    live_RC = weight_RC if factor is None else np.where(factor.dead_C, 0, weight_RC)
    keras_grid = grid_of(
        np.ascontiguousarray(layout.to_keras(live_RC)),
        np.ascontiguousarray(layout.to_keras(energy_RC)),
        scheme,
        scale_dtype,
    )
    codes_RC = np.empty(weight_RC.shape, np.uint8)
    slices: list[SolvedSlice] = []
    for channels, grid in _grids_by_pattern(layout, keras_grid, scheme.group_size):
        for a, b in row_slices(len(channels), layout.in_features):
            part = Grid(grid.scale_RG[a:b], grid.zero_RG[a:b], grid.group_C)
            rows_RC = weight_RC[channels[a:b]]
            solved = solve_on_grid(rows_RC, factor, hessian, damped, part, scheme)
            codes_RC[channels[a:b]] = solved.codes_CR.T
            slices.append(solved)
    weight = GroupedWeight(
        np.ascontiguousarray(layout.to_keras(codes_RC)).astype(np.uint8),
        keras_grid.scale_RG,
        keras_grid.zero_RG.astype(np.uint8),
        keras_grid.group_C,
    )
    damping = None if factor is None else factor.damping
    return weight, gptq_report(
        weight_RC, slices, damping, hessian.gram_CC.diagonal() == 0, hessian.num_rows, scheme
    )


def _grids_by_pattern(
    layout: KernelLayout, keras_grid: Grid, group_size: int
) -> list[tuple[NDArray[np.intp], Grid]]:
    """Output channels that group their inputs alike, with their grid as the matrix sees it."""
    num_columns, num_groups = keras_grid.scale_RG.shape
    group_of_row = contiguous_groups(layout.keras_rows, group_size)
    # The grid cell of each weight, in the kernel's shape and then in the matrix's.
    cells = group_of_row[:, None] + num_groups * np.arange(num_columns)
    cell_RC = layout.to_matrix(cells.reshape(layout.shape))
    patterns: dict[bytes, tuple[NDArray[np.int32], list[int], list[NDArray[np.intp]]]] = {}
    for channel, cell_C in enumerate(cell_RC):
        cell_G, inverse_C = np.unique(cell_C, return_inverse=True)
        group_C = inverse_C.astype(np.int32)
        _, channels, cells_of = patterns.setdefault(group_C.tobytes(), (group_C, [], []))
        channels.append(channel)
        cells_of.append(cell_G)
    scale, zero = keras_grid.scale_RG.ravel(), keras_grid.zero_RG.ravel()
    return [
        (np.asarray(channels), Grid(scale[np.stack(cells_of)], zero[np.stack(cells_of)], group_C))
        for group_C, channels, cells_of in patterns.values()
    ]
