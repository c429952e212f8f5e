"""GPTQ's column loop, for one slice of output channels.

This is Algorithm 1 of the paper (arXiv 2210.17323), rearranged; `gptq` in tests/reference.py is
its readable form, in float64. Where each of its steps is here:

    H⁻¹ ← Cholesky(H⁻¹)ᵀ          `quantizer.gptq.factor`, which never inverts H
    for each block of columns     `solve_slice`, panel by panel
      for each column j           `_solve_panel` → `_solve_tile`, column by column
        Q_j ← quant(W_j)          `encode` on a grid found before
        E_j ← (W_j - Q_j) / …     the error itself, w - ŵ: the factor has a unit diagonal
        W_j.. ← W_j.. - E_j H⁻¹   not here: see below
      W_rest ← W_rest - E H⁻¹     `add_product`

The paper is right-looking: a finished column's error updates all later ones. This loop is
left-looking: a column first collects its corrections from all earlier errors, in three nested
levels. A panel does so by products with the errors of finished panels, a block inside it by
products with the panel's own, a tile inside that by a small product, and only the columns of a
tile see each other one at a time. Nothing finished is multiplied again, and a tile stays in cache.

Round-to-nearest is GPTQ that ignores its corrections. It runs along in the same products, as the
second half of every row, so that each output channel's loss is known for both and the better is
kept.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from quantizer.gptq.factor import PANEL, TILE, Factor, block_size
from quantizer.jit import product, program
from quantizer.qparams import decode, encode


class SolvedSlice(NamedTuple):
    """One slice of output channels.

    Attributes:
        codes_CR: uint8 codes in the original input order, [in_features, slice].
        loss_R, rtn_loss_R: output error under the undamped Hessian of what was kept and of
            round-to-nearest, per output channel.
        rtn_kept_R: where round-to-nearest was the better one.
        weight_error_R: Σ(w - ŵ)² per output channel.
    """

    codes_CR: Array
    loss_R: Array
    rtn_loss_R: Array
    rtn_kept_R: Array
    weight_error_R: Array


class _SolvedPanel(NamedTuple):
    """A panel's result; the axis of 2 holds GPTQ, then rounding.

    Attributes:
        errors_P2R: w - ŵ.
        codes_P2R: uint8.
        loss_2R: output error under the undamped Hessian, of all columns so far.
        error_2R: Σ(w - ŵ)², of all columns so far.
    """

    errors_P2R: Array
    codes_P2R: Array
    loss_2R: Array
    error_2R: Array


def _weighted_sum(weight_P: Array, values_P2R: Array) -> Array:
    # As a matrix product: XLA's CPU reductions over rows are several times slower.
    return correction_of(weight_P[None], values_P2R)[0]


def _solve_tile(
    columns: Columns, first: Array, correction_T2R: Array, tile_TT: Array, max_code: float
) -> Array:
    """Quantize a tile's columns one by one, from the panel's `first` on.

    Args:
        correction_T2R: the corrections by all columns before the tile.
        tile_TT: the factor between the tile's columns.

    Returns:
        The errors w - ŵ, [TILE, 2, slice]; the axis of 2 holds GPTQ, then rounding.
    """
    corrected_2R = jnp.array([[1.0], [0.0]])

    # Codes and losses follow from the errors, so a column costs one product and one pass.
    def column(k: Array, errors_T2R: Array) -> Array:
        weight_R = columns.weight_PR[first + k]
        scale_R, zero_R = columns.grid_at(first + k)
        # Errors of columns not yet solved are still zero: no mask is needed.
        seen_2R = correction_of(lax.dynamic_slice_in_dim(tile_TT, k, 1), errors_T2R)[0]
        wanted_2R = weight_R + corrected_2R * (correction_T2R[k] + seen_2R)
        code_2R = encode(wanted_2R, scale_R, zero_R, max_code)
        error_2R = weight_R - decode(code_2R, scale_R, zero_R)
        with_column: Array = lax.dynamic_update_index_in_dim(errors_T2R, error_2R, k, 0)
        return with_column

    errors_T2R: Array = lax.fori_loop(0, TILE, column, jnp.zeros_like(correction_T2R))
    return errors_T2R


@program(donate_argnames="correction_P2R")
def _solve_panel(
    columns: Columns,
    pivot_P: Array,
    correction_P2R: Array,
    corner_PP: Array,
    num_tiles: Array | int,
    shift: Array,
    loss_2R: Array,
    error_2R: Array,
    *,
    max_code: float,
) -> _SolvedPanel:
    """Quantize a panel's first `num_tiles` tiles, block by block, tile by tile.

    `num_tiles` and `max_code` are not compiled in: one program serves all panels of a size.

    Args:
        pivot_P: the factor's D; 0 at inputs whose errors cost nothing.
        correction_P2R: the corrections by all columns before the panel; its buffer is reused.
        corner_PP: the factor between the panel's columns.
        shift: what was added to H's diagonal.
        loss_2R, error_2R: the sums of all columns before.
    """
    size = block_size(corner_PP.shape[0])
    tiles_of_block = size // TILE

    def block(m: Array, done: _SolvedPanel) -> _SolvedPanel:
        start = m * size

        def earlier(i: Array, correction_B2R: Array) -> Array:
            part_BB = lax.dynamic_slice(corner_PP, (start, i * size), (size, size))
            return add_product(part_BB, rows_of(done.errors_P2R, i * size, size), correction_B2R)

        correction_B2R = lax.fori_loop(0, m, earlier, rows_of(done.errors_P2R, start, size))
        corner_BB = lax.dynamic_slice(corner_PP, (start, start), (size, size))

        def tile(t: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            errors_B2R, loss_2R = state
            above_TB = rows_of(corner_BB, t * TILE, TILE)
            correction_T2R = rows_of(correction_B2R, t * TILE, TILE) + correction_of(
                above_TB, errors_B2R
            )
            tile_TT = lax.dynamic_slice_in_dim(above_TB, t * TILE, TILE, axis=1)
            first = start + t * TILE
            errors_T2R = _solve_tile(columns, first, correction_T2R, tile_TT, max_code)
            # w̃ - ŵ: with a unit diagonal the product includes each column's own error.
            deviations_T2R = correction_T2R + correction_of(tile_TT, errors_T2R)
            # tr(Δ H Δᵀ) = tr(Δ (H + shift I) Δᵀ) - shift ‖Δ‖², column by column.
            pivot_T = rows_of(pivot_P, first, TILE)
            return (
                lax.dynamic_update_slice_in_dim(errors_B2R, errors_T2R, t * TILE, 0),
                loss_2R + _weighted_sum(pivot_T, deviations_T2R**2),
            )

        count = jnp.minimum(num_tiles - m * tiles_of_block, tiles_of_block)
        none_B2R = jnp.zeros((size, *correction_P2R.shape[1:]))
        errors_B2R, loss_2R = lax.fori_loop(0, count, tile, (none_B2R, done.loss_2R))
        part = columns.part(start, size)
        scale_BR, zero_BR = part.grid()
        # Encoding w - (w - ŵ) gives each code back exactly: its rounding is far below a step.
        decoded_B2R = part.weight_PR[:, None] - errors_B2R
        codes_B2R = encode(decoded_B2R, scale_BR[:, None], zero_BR[:, None], max_code)
        squares_2R = _weighted_sum(jnp.ones(size), errors_B2R**2)
        counted_B = jnp.where(rows_of(pivot_P, start, size) > 0, 1.0, 0.0)
        counted_2R = _weighted_sum(counted_B, errors_B2R**2)
        return _SolvedPanel(
            lax.dynamic_update_slice_in_dim(done.errors_P2R, errors_B2R, start, 0),
            lax.dynamic_update_slice_in_dim(done.codes_P2R, codes_B2R.astype(jnp.uint8), start, 0),
            loss_2R - shift * counted_2R,
            done.error_2R + squares_2R,
        )

    # Rows of blocks that are not solved yet still hold corrections.
    codes_P2R = jnp.zeros(correction_P2R.shape, jnp.uint8)
    unsolved = _SolvedPanel(correction_P2R, codes_P2R, loss_2R, error_2R)
    num_blocks = (num_tiles + tiles_of_block - 1) // tiles_of_block
    solved: _SolvedPanel = lax.fori_loop(0, num_blocks, block, unsolved)
    return solved


def solve_slice(columns: Columns, factor: Factor, *, weight_bits: int) -> SolvedSlice:
    """Solve the output channels of one slice.

    Inputs that calibration never saw are alone in the factor: no error reaches their columns and
    none leaves them, so that their weights are rounded to nearest.

    One program solves a panel, so that what is compiled does not grow with in_features.

    Args:
        columns: all of the slice's, in the original input order.
        factor: of the Hessian.
    """
    num_inputs, num_outputs = columns.weight_PR.shape
    done: list[Array] = []
    codes: list[Array] = []
    loss_2R = error_2R = zeros((2, num_outputs))
    for index, (*above, corner_PP) in enumerate(factor.panels):
        first, size = index * PANEL, corner_PP.shape[0]
        panel = panel_columns(columns, factor.order_C, first, size)
        correction_P2R = zeros((size, 2, num_outputs))
        # One product per finished panel: concatenating them first would copy all of them.
        for block_PA, errors_A2R in zip(above, done, strict=True):
            correction_P2R = add_product(block_PA, errors_A2R, correction_P2R)
        num_tiles = -(-min(num_inputs - first, size) // TILE)
        errors_P2R, codes_P2R, loss_2R, error_2R = _solve_panel(
            panel,
            panel_part(factor.pivot_C, first, size=size),
            correction_P2R,
            corner_PP,
            num_tiles,
            factor.shift,
            loss_2R,
            error_2R,
            max_code=2.0**weight_bits - 1,
        )
        done.append(errors_P2R)
        codes.append(codes_P2R)
    return better(tuple(codes), factor.order_C, loss_2R, error_2R, num_inputs=num_inputs)


@program(static_argnames="num_inputs")
def better(
    codes: tuple[Array, ...], order_C: Array, loss_2R: Array, error_2R: Array, *, num_inputs: int
) -> SolvedSlice:
    """The better of GPTQ and rounding, channel by channel, in the original input order."""
    loss_R, rtn_loss_R = loss_2R
    rtn_kept_R = rtn_loss_R < loss_R
    codes_C2R = jnp.concatenate(codes)
    kept_CR = jnp.where(rtn_kept_R, codes_C2R[:, 1], codes_C2R[:, 0])
    return SolvedSlice(
        jnp.zeros_like(kept_CR).at[order_C].set(kept_CR, unique_indices=True)[:num_inputs],
        # In float32 a loss of zero can come out just below it.
        jnp.maximum(jnp.minimum(loss_R, rtn_loss_R), 0.0),
        jnp.maximum(rtn_loss_R, 0.0),
        rtn_kept_R,
        jnp.where(rtn_kept_R, error_2R[1], error_2R[0]),
    )


@program(static_argnames="weight_bits")
def round_slice(columns: Columns, hessian_CC: Array, *, weight_bits: int) -> SolvedSlice:
    """Round a slice to nearest, for a Hessian that could not be factored.

    Args:
        columns: all of the slice's, in the original input order.
        hessian_CC: undamped, in that order.
    """
    scale_CR, zero_CR = columns.grid()
    weight_CR = columns.weight_PR
    codes_CR = encode(weight_CR, scale_CR, zero_CR, 2.0**weight_bits - 1)
    error_CR = weight_CR - decode(codes_CR, scale_CR, zero_CR)
    loss_R = jnp.maximum(jnp.sum(error_CR * product(hessian_CC, error_CR), axis=0), 0.0)
    return SolvedSlice(
        codes_CR.astype(jnp.uint8),
        loss_R,
        loss_R,
        jnp.ones(loss_R.shape, bool),
        jnp.sum(error_CR**2, axis=0),
    )


def rows_of(rows: Array, first: Array | int, size: int) -> Array:
    """The `size` rows from `first` on."""
    part: Array = lax.dynamic_slice_in_dim(rows, first, size)
    return part


panel_part = program(static_argnames="size")(rows_of)


class Columns(NamedTuple):
    """Weights and grid of a slice of output channels, for one panel's columns or for all.

    Attributes:
        weight_PR: [columns, slice], float32.
        group_P: group of each column, int32.
        scale_GR, zero_GR: the slice's grid, [groups, slice].
    """

    weight_PR: Array
    group_P: Array
    scale_GR: Array
    zero_GR: Array

    def grid_at(self, column: Array) -> tuple[Array, Array]:
        """Scales and zero points of a column, [slice] each."""
        group = self.group_P[column]
        return self.scale_GR[group], self.zero_GR[group]

    def part(self, first: Array | int, size: int) -> Columns:
        """`size` columns of the panel."""
        weight_BR = rows_of(self.weight_PR, first, size)
        group_B = rows_of(self.group_P, first, size)
        return Columns(weight_BR, group_B, self.scale_GR, self.zero_GR)

    def with_scales(self, scale_GR: Array) -> Columns:
        """The same columns with other scales."""
        return Columns(self.weight_PR, self.group_P, scale_GR, self.zero_GR)

    def grid(self) -> tuple[Array, Array]:
        """Scales and zero points of all columns, [panel, slice] each."""
        return jnp.take(self.scale_GR, self.group_P, 0), jnp.take(self.zero_GR, self.group_P, 0)


@program(static_argnames="size")
def columns_of(
    weight_CR: Array, group_C: Array, order_C: Array, first: int, *, size: int
) -> tuple[Array, Array]:
    """Weights and groups of the panel of `size` columns from step `first` on."""
    source_P = lax.dynamic_slice_in_dim(order_C, first, size)
    given_P = source_P < weight_CR.shape[0]
    weight_PR = jnp.take(weight_CR, source_P, axis=0, mode="clip")
    return jnp.where(given_P[:, None], weight_PR, 0.0), jnp.take(group_C, source_P, mode="clip")


def panel_columns(columns: Columns, order_C: Array, first: int, size: int) -> Columns:
    """The panel of `size` columns from step `first` on; padded ones have weights of zero."""
    weight_CR, group_C, scale_GR, zero_GR = columns
    chosen = columns_of(weight_CR, group_C, order_C, first, size=size)
    return Columns(*chosen, scale_GR, zero_GR)


@program(static_argnums=0)
def zeros(shape: tuple[int, ...]) -> Array:
    """Zeros, float32; uncompiled, JAX needs half a millisecond for them."""
    return jnp.zeros(shape)


@program()
def add_product(block_BA: Array, errors_A: Array, correction: Array) -> Array:
    """`correction`, [B, ...], plus the corrections for the errors of finished columns."""
    return correction + correction_of(block_BA, errors_A)


def correction_of(block_BA: Array, errors_A: Array) -> Array:
    """The corrections for the errors of finished columns, [B, ...]."""
    flat: Array = product(block_BA, errors_A.reshape(errors_A.shape[0], -1))
    return flat.reshape(-1, *errors_A.shape[1:])
