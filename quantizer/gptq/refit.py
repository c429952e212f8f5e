"""Scales refitted to codes: least squares under the Hessian, with codes and zero points held.

With q = code - zero, an output channel's loss is quadratic in the scales s_g of its groups:

    ‖w - Σ_g s_g q_g‖²_H,    least where Zᵀ H Z s = Zᵀ H w, with a column q_g of Z for each group.

A refit visits the groups in order and gives each its best scale for all others as they stand,

    s_g ← s_g + q_gᵀ (H (w - ŵ))_g / (q_gᵀ H_gg q_g),

rounded to what is stored, so that later groups make up for the rounding of earlier ones. This is
one pass of Gauss and Seidel over the system: codes move in the sweep that follows, so that more
passes, or a solution of all scales at once, would be soon out of date (tests show that passes
approach it). Zᵀ H Z is never factored, so nothing can be ill-conditioned: a group without
curvature keeps its scale. H is the damped Hessian, as in the sweeps.

A scale changes only where both the damped loss and the true one, without damping, fall.

A pass takes 2·C²·R flops for H (w - ŵ), and 2·U·C·R for what the groups of a unit of U inputs
(about a panel; see `unit_size`) do to one another. A sweep takes as many products, and the column
loop on top of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array, lax

from quantizer.gptq.column_loop import Columns
from quantizer.gptq.factor import PANEL
from quantizer.jit import product, program
from quantizer.qparams import decode, encode


@dataclass(frozen=True, slots=True)
class Refit:
    """What refitting scales needs beside a slice's columns.

    Attributes:
        gram_CC: Σ xᵀx.
        num_rows: it is over, a float32 scalar.
        group_size: inputs of each group, which are contiguous; the last group may be short.
        scale_dtype: in which scales are stored.
    """

    gram_CC: Array
    num_rows: Array
    group_size: int
    scale_dtype: str


def unit_size(group_size: int) -> int:
    """Inputs whose corrections one product brings up to date: a panel's whole groups, or one."""
    return max(PANEL // group_size, 1) * group_size


def refit_scales(
    columns: Columns,
    missing_CR: Array,
    shift: Array,
    change_R: Array,
    max_code: float,
    refit: Refit,
) -> tuple[Array, Array, Array]:
    """One pass over all groups of a slice.

    Args:
        columns: all of the slice's, in the original input order, with their present grid.
        missing_CR: w - ŵ on that grid.
        shift: what is added to H's diagonal.
        change_R: the damped loss's change so far.

    Returns:
        The new scales, [groups, slice]; w - ŵ with them; and the damped loss's change.
    """
    num_inputs = columns.weight_PR.shape[0]
    size = unit_size(refit.group_size)
    scale_GR = columns.scale_GR
    for first in range(0, num_inputs, size):
        scale_GR, missing_CR, change_R = _refit_unit(
            columns.with_scales(scale_GR),
            missing_CR,
            refit.gram_CC,
            refit.num_rows,
            shift,
            change_R,
            first,
            max_code,
            size=min(size, num_inputs - first),
            group_size=refit.group_size,
            scale_dtype=refit.scale_dtype,
        )
    return scale_GR, missing_CR, change_R


@program(static_argnames=("size", "group_size", "scale_dtype"))
def _refit_unit(
    columns: Columns,
    missing_CR: Array,
    gram_CC: Array,
    num_rows: Array,
    shift: Array,
    change_R: Array,
    first: Array | int,
    max_code: float,
    *,
    size: int,
    group_size: int,
    scale_dtype: str,
) -> tuple[Array, Array, Array]:
    """Refit the groups of `size` inputs from `first` on; the last of them may be short."""
    num_groups = -(-size // group_size)
    fill = num_groups * group_size - size
    rows_UC = lax.dynamic_slice_in_dim(gram_CC, first, size) * (2.0 / num_rows)
    missing_UR = lax.dynamic_slice_in_dim(missing_CR, first, size)
    correction_UR = product(rows_UC, missing_CR) + shift * missing_UR
    corner_UU = lax.dynamic_slice_in_dim(rows_UC, first, size, axis=1) + shift * jnp.eye(size)
    part = columns.part(first, size)
    grid = part.grid()
    # Encoding a decoded weight gives its code back exactly.
    steps_UR = encode(part.weight_PR - missing_UR, *grid, max_code) - grid[1]

    def filled(rows: Array) -> Array:
        return jnp.pad(rows, ((0, fill), (0, 0)))

    correction_UR, steps_UR, missing_UR = map(filled, (correction_UR, steps_UR, missing_UR))
    corner_UU = jnp.pad(corner_UU, (0, fill))
    first_group = first // group_size
    scale_NR = lax.dynamic_slice_in_dim(columns.scale_GR, first_group, num_groups)

    def group(g: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        moved_UR, scale_NR, change_R = state

        def of_group(rows: Array, axis: int = 0) -> Array:
            return lax.dynamic_slice_in_dim(rows, g * group_size, group_size, axis)

        rows_SU = of_group(corner_UU)
        steps_SR, missing_SR = of_group(steps_UR), of_group(missing_UR)
        # Of groups not yet visited nothing moved.
        correction_SR = of_group(correction_UR) - product(rows_SU, moved_UR)
        slope_R = _sums(steps_SR * correction_SR)
        curvature_R = _sums(steps_SR * product(of_group(rows_SU, 1), steps_SR))
        scale_R = scale_NR[g]
        best_R = scale_R + slope_R / jnp.where(curvature_R > 0, curvature_R, 1.0)
        # Through a number of what is stored: codes must be found on the grid that is read back.
        best_R = best_R.astype(scale_dtype).astype(jnp.float32)
        step_R = best_R - scale_R
        damped_R = step_R * (step_R * curvature_R - 2 * slope_R)
        grown_R = step_R * (step_R * _sums(steps_SR**2) - 2 * _sums(steps_SR * missing_SR))
        better_R = (best_R > 0) & (curvature_R > 0) & (damped_R < 0) & (damped_R < shift * grown_R)
        step_R = jnp.where(better_R, step_R, 0.0)
        return (
            lax.dynamic_update_slice_in_dim(moved_UR, step_R * steps_SR, g * group_size, 0),
            scale_NR.at[g].set(jnp.where(better_R, best_R, scale_R)),
            change_R + jnp.where(better_R, damped_R, 0.0),
        )

    still_UR = jnp.zeros_like(correction_UR)
    _, scale_NR, change_R = lax.fori_loop(0, num_groups, group, (still_UR, scale_NR, change_R))
    scale_GR = lax.dynamic_update_slice_in_dim(columns.scale_GR, scale_NR, first_group, 0)
    scale_UR = jnp.take(scale_GR, part.group_P, 0)
    restored_UR = decode(steps_UR[:size] + grid[1], scale_UR, grid[1])
    missing_UR = part.weight_PR - restored_UR
    missing_CR = lax.dynamic_update_slice_in_dim(missing_CR, missing_UR, first, 0)
    return scale_GR, missing_CR, change_R


def _sums(values_SR: Array) -> Array:
    # As a matrix product: XLA's CPU reductions over rows are several times slower.
    return product(jnp.ones((1, values_SR.shape[0])), values_SR)[0]
