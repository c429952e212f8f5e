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
    """

    weight_CR: Array
    scale_GR: Array
    zero_GR: Array
    live_C: Array
    input_C: Array
    group_C: Array


def _solve_tile(
    columns: _Columns,
    first: Array,
    pull_T2R: Array,
    tile_TT: Array,
    codes_C2R: Array,
    max_code: float,
) -> tuple[Array, Array, Array]:
    """Quantize a tile's columns one by one, from step `first` on; GPTQ first, then rounding.

    pull_T2R holds the corrections by all that lies before the tile. Returns the codes with the
    tile's written at its inputs, its errors w - ŵ and deviations w̃ - ŵ, [TILE, 2, slice].
    """
    obeys_2R = jnp.array([[1.0], [0.0]])

    def column(k: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        codes_C2R, errors_T2R, deviations_T2R = state
        source, group = columns.input_C[first + k], columns.group_C[first + k]
        weight_R = jnp.where(columns.live_C[source], columns.weight_CR[source], 0.0)
        scale_R, zero_R = columns.scale_GR[group], columns.zero_GR[group]
        # Errors of columns not yet solved are still zero: no mask is needed.
        seen = jnp.sum(tile_TT[k][:, None] * errors_T2R.reshape(TILE, -1), axis=0)
        pull_2R = pull_T2R[k] + seen.reshape(2, -1)
        code_2R = encode(weight_R + obeys_2R * pull_2R, scale_R, zero_R, max_code)
        error_2R = weight_R - decode(code_2R, scale_R, zero_R)
        return (
            lax.dynamic_update_index_in_dim(codes_C2R, code_2R.astype(jnp.uint8), source, 0),
            lax.dynamic_update_index_in_dim(errors_T2R, error_2R, k, 0),
            lax.dynamic_update_index_in_dim(deviations_T2R, error_2R + pull_2R, k, 0),
        )

    empty_T2R = jnp.zeros_like(pull_T2R)
    solved: tuple[Array, Array, Array] = lax.fori_loop(
        0, TILE, column, (codes_C2R, empty_T2R, empty_T2R)
    )
    return solved


def _pull(block_BA: Array, errors_A2R: Array) -> Array:
    """The corrections that finished columns' errors ask for, [B, 2, slice]."""
    flat = product(block_BA, errors_A2R.reshape(errors_A2R.shape[0], -1))
    return flat.reshape(-1, *errors_A2R.shape[1:])


def _solve_block(
    columns: _Columns,
    first: int,
    pull_B2R: Array,
    corner_BB: Array,
    codes_C2R: Array,
    max_code: float,
) -> tuple[Array, Array, Array]:
    """Quantize a block's columns tile by tile; arguments and results as `_solve_tile`'s."""

    def tile(t: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        codes_C2R, errors_B2R, deviations_B2R = state
        start = t * TILE
        above_TB = lax.dynamic_slice_in_dim(corner_BB, start, TILE)
        pull_T2R = lax.dynamic_slice_in_dim(deviations_B2R, start, TILE)
        pull_T2R = pull_T2R + _pull(above_TB, errors_B2R)
        tile_TT = lax.dynamic_slice_in_dim(above_TB, start, TILE, axis=1)
        codes_C2R, errors_T2R, deviations_T2R = _solve_tile(
            columns, first + start, pull_T2R, tile_TT, codes_C2R, max_code
        )
        return (
            codes_C2R,
            lax.dynamic_update_slice_in_dim(errors_B2R, errors_T2R, start, 0),
            lax.dynamic_update_slice_in_dim(deviations_B2R, deviations_T2R, start, 0),
        )

    solved: tuple[Array, Array, Array] = lax.fori_loop(
        0, corner_BB.shape[0] // TILE, tile, (codes_C2R, jnp.zeros_like(pull_B2R), pull_B2R)
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
    )
    codes_C2R = jnp.zeros((num_steps, 2, num_outputs), jnp.uint8)
    done: list[Array] = []
    loss_2R = error_2R = jnp.zeros((2, num_outputs))
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
            codes_C2R, errors_M2R, deviations_M2R = _solve_block(
                columns, a + m, pull_M2R, corner_BB[m:n, m:n], codes_C2R, max_code
            )
            errors.append(errors_M2R)
            # tr(Δ H Δᵀ) = tr(Δ (H + shift I) Δᵀ) - shift ‖Δ‖², column by column.
            pivot_M = pivot_C[a + m : a + n, None, None]
            loss_2R += jnp.sum(pivot_M * deviations_M2R**2 - shift * errors_M2R**2, axis=0)
            error_2R += jnp.sum(errors_M2R**2, axis=0)
        if index + 1 < len(panels):
            done.append(jnp.concatenate(errors))

    loss_R, rtn_loss_R = loss_2R
    rtn_kept_R = rtn_loss_R < loss_R
    return SolvedSlice(
        jnp.where(rtn_kept_R, codes_C2R[:num_inputs, 1], codes_C2R[:num_inputs, 0]),
        # Rounding can leave a loss of nothing just below zero.
        jnp.maximum(jnp.minimum(loss_R, rtn_loss_R), 0.0),
        jnp.maximum(rtn_loss_R, 0.0),
        rtn_kept_R,
        jnp.where(rtn_kept_R, error_2R[1], error_2R[0]),
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
