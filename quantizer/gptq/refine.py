"""Refinement sweeps: coordinate descent on GPTQ's codes (QuantEase, arXiv 2309.01885, Alg. 1).

GPTQ rounds a column before the rounding of later ones is known. A sweep visits the columns again
and gives each code its best value for all others as they stand, so that the loss can only fall.
The nesting is that of the column loop: one product for each pair of panels, a small one per tile.
Between the sweeps scales may be refitted to the codes (`quantizer.gptq.refit`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import jax.numpy as jnp
from jax import Array, lax

from quantizer.gptq.column_loop import (
    Columns,
    SolvedSlice,
    add_product,
    panel_columns,
    rows_of,
    zeros,
)
from quantizer.gptq.factor import TILE, Blocks, Factor, block_size, panel_bounds
from quantizer.gptq.refit import Refit, refit_scales
from quantizer.jit import product, program
from quantizer.qparams import decode, encode


@program()
def damped_hessian(gram_CC: Array, num_rows: Array, shift: Array) -> Blocks:
    """2·gram/num_rows + shift·I in blocks of a panel each way.

    Made once for all slices of one input, which would otherwise each keep a copy.
    """
    bounds = panel_bounds(gram_CC.shape[0])
    hessian_CC = damped(gram_CC, num_rows, shift)
    return tuple(tuple(hessian_CC[a:b, c:d] for c, d in bounds) for a, b in bounds)


def damped(gram_CC: Array, num_rows: Array, shift: Array) -> Array:
    """2·gram/num_rows + shift·I, padded as the factor is."""
    size = gram_CC.shape[0]
    padding = panel_bounds(size)[-1][1] - size
    hessian_CC = gram_CC * (2.0 / num_rows) + shift * jnp.eye(size)
    # A padded input has no curvature.
    return jnp.pad(hessian_CC, ((0, padding), (0, padding)))


@program()
def _missing(columns: Columns, codes_CR: Array, first: int) -> Array:
    """w - ŵ of a panel's inputs, [panel, slice]; rows past the last input are not used."""
    input_P = first + jnp.arange(columns.weight_PR.shape[0])
    codes_PR = jnp.take(codes_CR, input_P, axis=0, mode="clip").astype(jnp.float32)
    return columns.weight_PR - decode(codes_PR, *columns.grid())


@program(donate_argnames="correction_PR")
def _sweep_panel(
    columns: Columns,
    missing_PR: Array,
    correction_PR: Array,
    corner_PP: Array,
    num_tiles: Array | int,
    change_R: Array,
    *,
    max_code: float,
) -> tuple[Array, Array]:
    """Visit a panel's first inputs once: their w - ŵ afterwards, and the damped loss's change.

    Args:
        missing_PR: w - ŵ so far.
        correction_PR: H's rows of this panel times w - ŵ of all inputs.
        num_tiles: how many tiles are visited; not compiled in, as in the column loop.
        change_R: the change so far.
    """
    size = block_size(corner_PP.shape[0])
    tiles_of_block = size // TILE
    curvature_P = jnp.diagonal(corner_PP)
    inverse_P = jnp.where(curvature_P > 0, 1.0 / curvature_P, 0.0)

    def block(m: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        moved_PR, change_R = state
        start = m * size

        def earlier(i: Array, correction_BR: Array) -> Array:
            part_BB = lax.dynamic_slice(corner_PP, (start, i * size), (size, size))
            return add_product(part_BB, rows_of(moved_PR, i * size, size), correction_BR)

        correction_BR = lax.fori_loop(0, m, earlier, rows_of(moved_PR, start, size))
        corner_BB = lax.dynamic_slice(corner_PP, (start, start), (size, size))
        part = columns.part(start, size)
        decoded_BR = part.weight_PR - rows_of(missing_PR, start, size)
        inverse_B = rows_of(inverse_P, start, size)

        def tile(t: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            moved_BR, change_R = state
            first = t * TILE
            above_TB = rows_of(corner_BB, first, TILE)
            correction_TR = rows_of(correction_BR, first, TILE) + product(above_TB, moved_BR)
            tile_TT = lax.dynamic_slice_in_dim(above_TB, first, TILE, axis=1)

            def column(k: Array, moved_TR: Array) -> Array:
                at = first + k
                seen = product(lax.dynamic_slice_in_dim(tile_TT, k, 1), moved_TR)
                # The best value of this weight alone, all others held.
                wanted_R = decoded_BR[at] + (correction_TR[k] + seen[0]) * inverse_B[at]
                scale_R, zero_R = part.grid_at(at)
                code_R = encode(wanted_R, scale_R, zero_R, max_code)
                moved_R = decoded_BR[at] - decode(code_R, scale_R, zero_R)
                moved: Array = lax.dynamic_update_index_in_dim(moved_TR, moved_R, k, 0)
                return moved

            moved_TR: Array = lax.fori_loop(0, TILE, column, jnp.zeros_like(correction_TR))
            # tr((E + M)ᵀ H (E + M)) - tr(Eᵀ H E), of these rows of M, summed by a product.
            gain_TR = moved_TR * (2.0 * correction_TR + product(tile_TT, moved_TR))
            return (
                lax.dynamic_update_slice_in_dim(moved_BR, moved_TR, first, 0),
                change_R + product(jnp.ones((1, TILE)), gain_TR)[0],
            )

        count = jnp.minimum(num_tiles - m * tiles_of_block, tiles_of_block)
        still_BR = jnp.zeros((size, correction_PR.shape[1]))
        moved_BR, change_R = lax.fori_loop(0, count, tile, (still_BR, change_R))
        return lax.dynamic_update_slice_in_dim(moved_PR, moved_BR, start, 0), change_R

    num_blocks = (num_tiles + tiles_of_block - 1) // tiles_of_block
    # Once a block is visited, how far its weights moved replaces their corrections.
    moved_PR, change_R = lax.fori_loop(0, num_blocks, block, (correction_PR, change_R))
    return missing_PR + moved_PR, change_R


class Sweep(Protocol):
    """One of the ways to visit all columns: `sweep_panels` or `gpu_loop.sweep_whole`."""

    def __call__(
        self,
        panels: tuple[Columns, ...],
        missing: tuple[Array, ...],
        hessian: Blocks,
        change_R: Array,
        *,
        num_inputs: int,
        max_code: float,
    ) -> tuple[tuple[Array, ...], Array]:
        """w - ŵ once all columns are visited, and the damped loss's change.

        Args:
            panels: the columns, in the original order, cut and padded as the Hessian is.
            missing: w - ŵ of each panel so far.
            hessian: damped.
            change_R: the change so far.
        """


def sweep_panels(
    panels: tuple[Columns, ...],
    missing: tuple[Array, ...],
    hessian: Blocks,
    change_R: Array,
    *,
    num_inputs: int,
    max_code: float,
) -> tuple[tuple[Array, ...], Array]:
    """Visit all columns, with one product for each pair of panels."""
    after = list(missing)
    for p, (a, b) in enumerate(panel_bounds(num_inputs)):
        correction_PR = zeros((b - a, *change_R.shape))
        for block_PA, missing_AR in zip(hessian[p], after, strict=True):
            correction_PR = add_product(block_PA, missing_AR, correction_PR)
        num_tiles = -(-(min(num_inputs, b) - a) // TILE)
        after[p], change_R = _sweep_panel(
            panels[p],
            after[p],
            correction_PR,
            hessian[p][p],
            num_tiles,
            change_R,
            max_code=max_code,
        )
    return tuple(after), change_R


def refine_slice(
    solved: SolvedSlice,
    columns: Columns,
    factor: Factor,
    hessian: Blocks,
    *,
    weight_bits: int,
    sweeps: int,
    sweep: Sweep = sweep_panels,
    refit: Refit | None = None,
) -> tuple[SolvedSlice, Array]:
    """Lower the damped loss of a solved slice; channels whose undamped loss rises stay as given.

    Args:
        solved: what was found for these columns with this factor.
        hessian: damped by the factor's shift, cut as `sweep` needs it.
        sweeps: times that every column is revisited.
        refit: for scales that are refitted before each sweep.

    Returns:
        The slice, and its scales, [groups, slice].
    """
    num_inputs, num_outputs = columns.weight_PR.shape
    max_code = 2.0**weight_bits - 1
    heights = tuple(row[0].shape[0] for row in hessian)
    starts = [sum(heights[:p]) for p in range(len(heights))]
    order_C = _in_order(sum(heights))
    panels = tuple(
        panel_columns(columns, order_C, a, height)
        for a, height in zip(starts, heights, strict=True)
    )
    before = tuple(
        _missing(panel, solved.codes_CR, a) for panel, a in zip(panels, starts, strict=True)
    )
    after, change_R = before, zeros((num_outputs,))
    for _ in range(sweeps):
        if refit is not None:
            scale_GR, missing_CR, change_R = refit_scales(
                columns.with_scales(panels[0].scale_GR),
                _whole(after, num_inputs=num_inputs),
                factor.shift,
                change_R,
                max_code,
                refit,
            )
            panels = tuple(panel.with_scales(scale_GR) for panel in panels)
            after = _cut(missing_CR, heights=heights)
        after, change_R = sweep(
            panels, after, hessian, change_R, num_inputs=num_inputs, max_code=max_code
        )
    given_GR = columns.scale_GR
    return _settled(solved, given_GR, panels, before, after, change_R, factor.shift, max_code)


@program(static_argnames="num_inputs")
def _whole(parts: tuple[Array, ...], *, num_inputs: int) -> Array:
    return jnp.concatenate(parts)[:num_inputs]


@program(static_argnames="heights")
def _cut(whole_CR: Array, *, heights: tuple[int, ...]) -> tuple[Array, ...]:
    """Panels of these heights, the last filled up with zeros."""
    whole_CR = jnp.pad(whole_CR, ((0, sum(heights) - whole_CR.shape[0]), (0, 0)))
    ends = [sum(heights[: p + 1]) for p in range(len(heights))]
    return tuple(whole_CR[b - height : b] for b, height in zip(ends, heights, strict=True))


@program(static_argnums=0)
def _in_order(size: int) -> Array:
    return jnp.arange(size)


@program()
def _settled(
    solved: SolvedSlice,
    scale_GR: Array,
    panels: tuple[Columns, ...],
    before: tuple[Array, ...],
    after: tuple[Array, ...],
    change_R: Array,
    shift: Array,
    max_code: float,
) -> tuple[SolvedSlice, Array]:
    """The better of the refined and the given codes, by w - ŵ of either, channel by channel.

    Args:
        scale_GR: of the given codes; those of the refined ones are the panels'.

    Returns:
        The slice and its scales.
    """
    num_inputs = solved.codes_CR.shape[0]

    def whole(parts: Iterable[Array]) -> Array:
        return jnp.concatenate(list(parts))[:num_inputs]

    before_CR, after_CR = whole(before), whole(after)
    # The sweeps lower the damped loss; what counts is the undamped one.
    grown_R = jnp.sum(after_CR**2 - before_CR**2, axis=0)
    loss_R = solved.loss_R + change_R - shift * grown_R
    better_R = loss_R < solved.loss_R
    kept_CR = jnp.where(better_R, after_CR, before_CR)
    # Encoding a decoded weight gives its code back exactly.
    weight_CR = whole(columns.weight_PR for columns in panels)
    group_C = whole(columns.group_P for columns in panels)
    grid = Columns(weight_CR, group_C, *panels[0][2:]).grid()
    codes_CR = encode(weight_CR - after_CR, *grid, max_code).astype(jnp.uint8)
    refined = SolvedSlice(
        jnp.where(better_R, codes_CR, solved.codes_CR),
        jnp.maximum(jnp.minimum(loss_R, solved.loss_R), 0.0),
        solved.rtn_loss_R,
        # A rounded channel that was refined is no longer round-to-nearest.
        solved.rtn_kept_R & ~better_R,
        jnp.sum(kept_CR**2, axis=0),
    )
    return refined, jnp.where(better_R, panels[0].scale_GR, scale_GR)
