"""GPTQ's column loop (arXiv 2210.17323), for a fixed slice of output channels.

Three nested, left-looking levels: a panel of columns is brought up to date by products with the
errors of all finished panels, a block inside it by products with the panel's own, a tile inside
that by a small one, and only the columns of a tile see each other one at a time. Nothing finished
is ever multiplied again, and a tile stays in cache.

Round-to-nearest is GPTQ that does not obey its corrections. It runs along in the same products, as
the second half of every row, so each output channel's loss is known both ways and the better one
is kept.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from quantizer.cholesky import product
from quantizer.factor import BLOCK, PANEL, TILE
from quantizer.grid import decode, encode


class SolvedSlice(NamedTuple):
    """One slice of output channels.

    Attributes:
        codes_CR: uint8 codes in the original input order, [in_features, slice].
        loss_R, rtn_loss_R: output error under the undamped Hessian of what was kept and of
            round-to-nearest, per output channel.
        rtn_kept_R: where round-to-nearest was the better one.
        weight_error_R: Σ(w - ŵ)² per output channel, dead inputs left out.
    """

    codes_CR: Array
    loss_R: Array
    rtn_loss_R: Array
    rtn_kept_R: Array
    weight_error_R: Array


class _Columns(NamedTuple):
    """What the columns read: the slice in its original input order, and where to find a column.

    Attributes:
        weight_CR, scale_GR, zero_GR, live_C: as in `solve_slice`.
        input_C, group_C: the input solved at each step and its group, [C'].
        pivot_C, shift: as in `solve_slice`.
    """

    weight_CR: Array
    scale_GR: Array
    zero_GR: Array
    live_C: Array
    input_C: Array
    group_C: Array
    pivot_C: Array
    shift: Array

    def at(self, step: Array) -> tuple[Array, Array, Array]:
        """Weights, scales and zero points of the column solved at a step, [slice] each."""
        source, group = self.input_C[step], self.group_C[step]
        weight_R = jnp.where(self.live_C[source], self.weight_CR[source], 0.0)
        return weight_R, self.scale_GR[group], self.zero_GR[group]


class _Totals(NamedTuple):
    """What is known of all columns solved so far, GPTQ first, then rounding.

    Attributes:
        codes_C2R: uint8, by step, [C', 2, slice].
        loss_2R: output error under the undamped Hessian.
        error_2R: Σ(w - ŵ)².
    """

    codes_C2R: Array
    loss_2R: Array
    error_2R: Array

    def with_tile(
        self,
        columns: _Columns,
        first: Array,
        errors_T2R: Array,
        deviations_T2R: Array,
        max_code: float,
    ) -> _Totals:
        """The totals with a tile more: its errors w - ŵ and deviations w̃ - ŵ."""
        weight_TR, scale_TR, zero_TR = jax.vmap(columns.at)(first + jnp.arange(TILE))
        # Each code comes back exactly: what rounding lost of w - (w - ŵ) is far below a step.
        restored_T2R = weight_TR[:, None] - errors_T2R
        codes_T2R = encode(restored_T2R, scale_TR[:, None], zero_TR[:, None], max_code)
        square_T2R = errors_T2R**2
        # tr(Δ H Δᵀ) = tr(Δ (H + shift I) Δᵀ) - shift ‖Δ‖², column by column.
        pivot_T = lax.dynamic_slice_in_dim(columns.pivot_C, first, TILE)[:, None, None]
        loss_T2R = pivot_T * deviations_T2R**2 - columns.shift * square_T2R
        return _Totals(
            lax.dynamic_update_slice_in_dim(self.codes_C2R, codes_T2R.astype(jnp.uint8), first, 0),
            self.loss_2R + _column_sum(loss_T2R),
            self.error_2R + _column_sum(square_T2R),
        )


def _column_sum(values_T2R: Array) -> Array:
    # By a product: XLA's CPU reductions over rows are several times slower.
    return _pull(jnp.ones((1, TILE)), values_T2R)[0]


def _pull(block_BA: Array, errors_A2R: Array) -> Array:
    """The corrections that finished columns' errors ask for, [B, 2, slice]."""
    flat: Array = product(block_BA, errors_A2R.reshape(errors_A2R.shape[0], -1))
    return flat.reshape(-1, *errors_A2R.shape[1:])


def _solve_tile(
    columns: _Columns, first: Array, pull_T2R: Array, tile_TT: Array, max_code: float
) -> Array:
    """Quantize a tile's columns one by one, from step `first` on; GPTQ first, then rounding.

    pull_T2R holds the corrections by all that lies before the tile. Returns its errors w - ŵ,
    [TILE, 2, slice].
    """
    obeys_2R = jnp.array([[1.0], [0.0]])

    # One product and one pass a column: the errors are all that is kept, and tell the rest.
    def column(k: Array, errors_T2R: Array) -> Array:
        weight_R, scale_R, zero_R = columns.at(first + k)
        # Errors of columns not yet solved are still zero: no mask is needed.
        seen_2R = _pull(lax.dynamic_slice_in_dim(tile_TT, k, 1), errors_T2R)[0]
        wanted_2R = weight_R + obeys_2R * (pull_T2R[k] + seen_2R)
        code_2R = encode(wanted_2R, scale_R, zero_R, max_code)
        error_2R = weight_R - decode(code_2R, scale_R, zero_R)
        with_column: Array = lax.dynamic_update_index_in_dim(errors_T2R, error_2R, k, 0)
        return with_column

    errors_T2R: Array = lax.fori_loop(0, TILE, column, jnp.zeros_like(pull_T2R))
    return errors_T2R


# A program of its own within the others, so that blocks of one size are traced once.
@partial(jax.jit, static_argnames="max_code")
def _solve_block(
    columns: _Columns,
    first: Array,
    pull_B2R: Array,
    corner_BB: Array,
    totals: _Totals,
    *,
    max_code: float,
) -> tuple[Array, _Totals]:
    """Quantize a block's columns tile by tile; the errors, and the totals with them."""

    def tile(t: Array, state: tuple[Array, _Totals]) -> tuple[Array, _Totals]:
        errors_B2R, totals = state
        start = t * TILE
        above_TB = lax.dynamic_slice_in_dim(corner_BB, start, TILE)
        pull_T2R = lax.dynamic_slice_in_dim(pull_B2R, start, TILE)
        pull_T2R = pull_T2R + _pull(above_TB, errors_B2R)
        tile_TT = lax.dynamic_slice_in_dim(above_TB, start, TILE, axis=1)
        errors_T2R = _solve_tile(columns, first + start, pull_T2R, tile_TT, max_code)
        # The factor's diagonal is one: each column's own error comes along.
        deviations_T2R = pull_T2R + _pull(tile_TT, errors_T2R)
        return (
            lax.dynamic_update_slice_in_dim(errors_B2R, errors_T2R, start, 0),
            totals.with_tile(columns, first + start, errors_T2R, deviations_T2R, max_code),
        )

    solved: tuple[Array, _Totals] = lax.fori_loop(
        0, corner_BB.shape[0] // TILE, tile, (jnp.zeros_like(pull_B2R), totals)
    )
    return solved


@partial(jax.jit, static_argnames="weight_bits")
def solve_slice(
    weight_CR: Array,
    scale_GR: Array,
    zero_GR: Array,
    group_C: Array,
    live_C: Array,
    order_C: Array,
    panels: tuple[tuple[Array, ...], ...],
    pivot_C: Array,
    shift: Array,
    *,
    weight_bits: int,
) -> SolvedSlice:
    """Solve the output channels of one slice; see `quantizer.factor.Factor` for the factor.

    Args:
        weight_CR: [in_features, slice], float32, original input order.
        scale_GR, zero_GR: the grid, [groups, slice].
        group_C: group of each input, [in_features], int32.
        live_C: False where calibration never saw the input: its weights become zero.
    """
    num_inputs, num_outputs = weight_CR.shape
    num_steps = order_C.shape[0]
    max_code = 2.0**weight_bits - 1
    padding = num_steps - num_inputs
    # A padded input is a dead one.
    columns = _Columns(
        weight_CR,
        scale_GR,
        zero_GR,
        jnp.pad(live_C, (0, padding)),
        order_C,
        jnp.take(jnp.pad(group_C, (0, padding)), order_C),
        pivot_C,
        shift,
    )
    done: list[Array] = []
    nothing_2R = jnp.zeros((2, num_outputs))
    totals = _Totals(jnp.zeros((num_steps, 2, num_outputs), jnp.uint8), nothing_2R, nothing_2R)
    for index, blocks in enumerate(panels):
        a = index * PANEL
        *above, corner_BB = blocks
        size = corner_BB.shape[0]
        pull_B2R = jnp.zeros((size, 2, num_outputs))
        # Product by product: joining the finished panels first would copy them all each time.
        for block_BA, errors_A2R in zip(above, done, strict=True):
            pull_B2R = pull_B2R + _pull(block_BA, errors_A2R)
        errors: list[Array] = []
        for m in range(0, size, BLOCK):
            n = min(m + BLOCK, size)
            pull_M2R = pull_B2R[m:n]
            for i, errors_M2R in enumerate(errors):
                pull_M2R = pull_M2R + _pull(corner_BB[m:n, i * BLOCK : (i + 1) * BLOCK], errors_M2R)
            errors_M2R, totals = _solve_block(
                columns,
                jnp.int32(a + m),
                pull_M2R,
                corner_BB[m:n, m:n],
                totals,
                max_code=max_code,
            )
            errors.append(errors_M2R)
        if index + 1 < len(panels):
            done.append(jnp.concatenate(errors))

    loss_R, rtn_loss_R = totals.loss_2R
    rtn_kept_R = rtn_loss_R < loss_R
    kept_CR = jnp.where(rtn_kept_R, totals.codes_C2R[:, 1], totals.codes_C2R[:, 0])
    return SolvedSlice(
        jnp.zeros_like(kept_CR).at[order_C].set(kept_CR, unique_indices=True)[:num_inputs],
        # Rounding can leave a loss of nothing just below zero.
        jnp.maximum(jnp.minimum(loss_R, rtn_loss_R), 0.0),
        jnp.maximum(rtn_loss_R, 0.0),
        rtn_kept_R,
        jnp.where(rtn_kept_R, totals.error_2R[1], totals.error_2R[0]),
    )


@partial(jax.jit, static_argnames="weight_bits")
def round_slice(
    weight_CR: Array,
    scale_GR: Array,
    zero_GR: Array,
    group_C: Array,
    hessian_CC: Array,
    *,
    weight_bits: int,
) -> SolvedSlice:
    """Round a slice to nearest, for a Hessian that could not be factored.

    Arguments as in `solve_slice`; hessian_CC is the undamped one, in the original order.
    """
    scale_CR = jnp.take(scale_GR, group_C, axis=0)
    zero_CR = jnp.take(zero_GR, group_C, axis=0)
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
