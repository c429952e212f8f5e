"""The column loop and the refinement where starting work is dear and memory is fast: on GPUs.

The same left-looking loops as in `column_loop` and `refine`, with two differences. A panel's
corrections are one product with all columns before it, where a CPU's caches prefer one for each
finished panel; and a block of columns is one kernel (`quantizer.gptq.block_kernel`).

The errors of columns not yet solved are zero, so that a product may reach beyond those solved: it
reaches for the next quarter of all columns, and four programs serve all panels. What solves a
panel depends on its own size alone, since compiling kernels takes longest.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from quantizer.gptq.block_kernel import Panel, refine_block, solve_block
from quantizer.gptq.column_loop import (
    Columns,
    SolvedSlice,
    better,
    correction_of,
    panel_columns,
    rows_of,
    zeros,
)
from quantizer.gptq.factor import PANEL, Blocks, Factor, block_size, panel_bounds
from quantizer.gptq.refine import damped
from quantizer.jit import product, program

_REACHES = 4


def solve_whole(columns: Columns, factor: Factor, *, weight_bits: int) -> SolvedSlice:
    """`column_loop.solve_slice`, for a factor in one panel and a multiple of 32 channels."""
    num_inputs, num_outputs = columns.weight_PR.shape
    ((unit_CC,),) = factor.panels
    padded = unit_CC.shape[0]
    ordered = panel_columns(columns, factor.order_C, 0, padded)
    errors_C2R, codes_C2R = _unsolved(ordered.weight_PR)
    loss_2R = error_2R = zeros((2, num_outputs))
    max_code = 2.0**weight_bits - 1
    for a, b in panel_bounds(padded):
        panel, correction, corner_PP, pivot_P = _unsolved_panel(
            errors_C2R, ordered, unit_CC, factor.pivot_C, a, size=b - a, reach=_reach(b, padded)
        )
        errors_P2R, codes_P2R, loss_2R, error_2R = _solve_panel(
            panel, correction, corner_PP, pivot_P, factor.shift, max_code, loss_2R, error_2R
        )
        errors_C2R, codes_C2R = _with_panel(errors_C2R, codes_C2R, errors_P2R, codes_P2R, a)
    return better((codes_C2R,), factor.order_C, loss_2R, error_2R, num_inputs=num_inputs)


def _reach(end: int, padded: int) -> int:
    """How many columns a product takes that needs those before `end`."""
    quarter = -(-padded // (_REACHES * PANEL)) * PANEL
    return min(-(-end // quarter) * quarter, padded)


@program()
def _unsolved(ordered_CR: Array) -> tuple[Array, Array]:
    size, num_outputs = ordered_CR.shape
    shape = (size, 2, num_outputs)
    return jnp.zeros(shape), jnp.zeros(shape, jnp.uint8)


@program(static_argnames=("size", "reach"))
def _unsolved_panel(
    errors_C2R: Array,
    ordered: Columns,
    unit_CC: Array,
    pivot_C: Array,
    first: Array | int,
    *,
    size: int,
    reach: int,
) -> tuple[Panel, Array, Array, Array]:
    """What solving the panel of `size` columns from `first` on needs.

    Args:
        errors_C2R: w - ŵ of the columns before the panel; zero for the others.
        ordered: all columns in solving order.
        unit_CC, pivot_C: Aᵀ and D.

    Returns:
        its weights and grid; its corrections, by all columns before; its parts of Aᵀ and D.
    """
    above_PA = lax.dynamic_slice(unit_CC, (first, 0), (size, reach))
    return (
        _panel_of(ordered, first, size),
        correction_of(above_PA, errors_C2R[:reach]),
        lax.dynamic_slice(unit_CC, (first, first), (size, size)),
        rows_of(pivot_C, first, size),
    )


def _panel_of(columns: Columns, first: Array | int, size: int) -> Panel:
    part = columns.part(first, size)
    return Panel(part.weight_PR, *part.grid())


@program(donate_argnames="correction")
def _solve_panel(
    panel: Panel,
    correction: Array,
    corner_PP: Array,
    pivot_P: Array,
    shift: Array,
    max_code: Array | float,
    loss_2R: Array,
    error_2R: Array,
) -> tuple[Array, Array, Array, Array]:
    """Quantize a panel, block by block: w - ŵ, codes, and the sums as in `solve_block`."""
    limits = jnp.stack([jnp.float32(max_code), shift])
    errors, codes = [], []
    size = corner_PP.shape[0]
    for a in range(0, size, block_size(size)):
        b = a + block_size(size)
        errors_B2R, codes_B2R, loss_2R, error_2R = solve_block(
            panel, a, correction, corner_PP, pivot_P, limits, loss_2R, error_2R
        )
        errors.append(errors_B2R)
        codes.append(codes_B2R)
        if b < size:
            correction = correction[b - a :] + correction_of(corner_PP[b:, a:b], errors_B2R)
    return jnp.concatenate(errors), jnp.concatenate(codes), loss_2R, error_2R


@program(donate_argnames=("errors_C2R", "codes_C2R"))
def _with_panel(
    errors_C2R: Array, codes_C2R: Array, errors_P2R: Array, codes_P2R: Array, first: Array | int
) -> tuple[Array, Array]:
    return (
        lax.dynamic_update_slice_in_dim(errors_C2R, errors_P2R, first, 0),
        lax.dynamic_update_slice_in_dim(codes_C2R, codes_P2R, first, 0),
    )


@program()
def damped_whole(gram_CC: Array, num_rows: Array, shift: Array) -> Blocks:
    """`refine.damped_hessian` as one block."""
    return ((damped(gram_CC, num_rows, shift),),)


def sweep_whole(
    panels: tuple[Columns, ...],
    missing: tuple[Array, ...],
    hessian: Blocks,
    change_R: Array,
    *,
    num_inputs: int,
    max_code: float,
) -> tuple[tuple[Array, ...], Array]:
    """`refine.Sweep`, for columns and a Hessian in one block."""
    del num_inputs  # padded columns have no curvature, and so stay
    (whole,), ((hessian_CC,),) = panels, hessian
    missing_CR = _copied(missing[0])  # each panel writes into its buffer
    for a, b in panel_bounds(hessian_CC.shape[0]):
        panel, missing_PR, correction, corner_PP = _unrefined_panel(
            missing_CR, whole, hessian_CC, a, size=b - a
        )
        missing_PR, change_R = _refine_panel(
            panel, missing_PR, correction, corner_PP, max_code, change_R
        )
        missing_CR = _with_refined(missing_CR, missing_PR, a)
    return (missing_CR,), change_R


_copied = program()(jnp.copy)


@program(static_argnames="size")
def _unrefined_panel(
    missing_CR: Array, whole: Columns, hessian_CC: Array, first: Array | int, *, size: int
) -> tuple[Panel, Array, Array, Array]:
    """What refining the panel of `size` columns from `first` on needs.

    Returns:
        its weights and grid; its w - ŵ; H's rows of it times w - ŵ of all columns; its part of H.
    """
    rows_PC = rows_of(hessian_CC, first, size)
    return (
        _panel_of(whole, first, size),
        rows_of(missing_CR, first, size),
        product(rows_PC, missing_CR),
        lax.dynamic_slice_in_dim(rows_PC, first, size, axis=1),
    )


@program(donate_argnames="missing_PR")
def _refine_panel(
    panel: Panel,
    missing_PR: Array,
    correction: Array,
    corner_PP: Array,
    max_code: Array | float,
    change_R: Array,
) -> tuple[Array, Array]:
    """Visit a panel once, block by block: its w - ŵ afterwards, and the damped loss's change."""
    curvature_P = jnp.diagonal(corner_PP)
    inverse_P = jnp.where(curvature_P > 0, 1.0 / curvature_P, 0.0)
    limits = jnp.stack([jnp.float32(max_code)])
    moved = []
    size = corner_PP.shape[0]
    for a in range(0, size, block_size(size)):
        b = a + block_size(size)
        moved_BR, change_R = refine_block(
            panel, a, missing_PR, correction, corner_PP, inverse_P, limits, change_R
        )
        moved.append(moved_BR)
        if b < size:
            correction = correction[b - a :] + product(corner_PP[b:, a:b], moved_BR)
    return missing_PR + jnp.concatenate(moved), change_R


@program(donate_argnames="missing_CR")
def _with_refined(missing_CR: Array, missing_PR: Array, first: Array | int) -> Array:
    updated: Array = lax.dynamic_update_slice_in_dim(missing_CR, missing_PR, first, 0)
    return updated
