"""GPTQ's column loop (arXiv 2210.17323), for a fixed slice of output channels.

Two nested, left-looking blocks: a panel of columns is brought up to date by one matrix
product with the errors of all finished panels, a tile inside it by a small one, and only the
columns of a tile see each other one at a time. Nothing finished is ever multiplied again, and
the tile stays in cache. Round-to-nearest runs along in the same products, so each output
channel's loss is known both ways and the better one is kept.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from quantizer.cholesky import product
from quantizer.factor import PANEL, TILE
from quantizer.grid import decode, encode


class SolvedSlice(NamedTuple):
    """One slice of output channels.

    Attributes:
        codes_CR: uint8 codes in the original input order, [in_features, slice].
        loss_R, rtn_loss_R: output error under the undamped Hessian of what was kept and of
            round-to-nearest, per output channel.
        rtn_kept_R: where round-to-nearest was the better one.
        weight_error_R, weight_energy_R: Σ(w - ŵ)² and Σw² per output channel.
    """

    codes_CR: Array
    loss_R: Array
    rtn_loss_R: Array
    rtn_kept_R: Array
    weight_error_R: Array
    weight_energy_R: Array


def _solve_tile(
    target_TR: Array,
    weight_TR: Array,
    scale_TR: Array,
    zero_TR: Array,
    tile_TT: Array,
    max_code: float,
) -> tuple[Array, Array, Array]:
    """Quantize a tile's columns one by one.

    target_TR holds the weights corrected for all that lies before the tile. Returns codes,
    errors w - ŵ and deviations w̃ - ŵ, each [TILE, slice].
    """

    def column(k: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        codes_TR, errors_TR, deviations_TR = state
        # Errors of columns not yet solved are still zero: no mask is needed.
        wanted_R = target_TR[k] + jnp.sum(tile_TT[:, k, None] * errors_TR, axis=0)
        code_R = encode(wanted_R, scale_TR[k], zero_TR[k], max_code)
        restored_R = decode(code_R, scale_TR[k], zero_TR[k])
        return (
            lax.dynamic_update_index_in_dim(codes_TR, code_R.astype(jnp.uint8), k, 0),
            lax.dynamic_update_index_in_dim(errors_TR, weight_TR[k] - restored_R, k, 0),
            lax.dynamic_update_index_in_dim(deviations_TR, wanted_R - restored_R, k, 0),
        )

    empty_TR = jnp.zeros_like(target_TR)
    solved: tuple[Array, Array, Array] = lax.fori_loop(
        0, TILE, column, (empty_TR.astype(jnp.uint8), empty_TR, empty_TR)
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
    panels: tuple[Array, ...],
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
    max_code = 2.0**weight_bits - 1
    padding = order_C.shape[0] - num_inputs
    live_CR = jnp.where(live_C[:, None], weight_CR, 0.0)
    sorted_CR = jnp.take(jnp.pad(live_CR, ((0, padding), (0, 0))), order_C, axis=0)
    sorted_group_C = jnp.take(jnp.pad(group_C, (0, padding)), order_C)

    # One row of panels for both answers: errors of GPTQ beside those of round-to-nearest.
    done: list[Array] = []
    codes: list[Array] = []
    rtn_codes: list[Array] = []
    zeros_R = jnp.zeros(num_outputs)
    loss_R, rtn_loss_R, error_R, rtn_error_R = zeros_R, zeros_R, zeros_R, zeros_R
    for index, panel in enumerate(panels):
        a, b = index * PANEL, panel.shape[0]
        weight_BR, group_B = sorted_CR[a:b], sorted_group_C[a:b]
        corner_BB = panel[a:b]
        pull_BR = jnp.zeros((b - a, 2 * num_outputs))
        # Product by product: joining the finished panels first would copy them all each time.
        for finished, errors_B2R in enumerate(done):
            start = finished * PANEL
            pull_BR = pull_BR + product(panel[start : start + PANEL].T, errors_B2R)
        target_BR = weight_BR + pull_BR[:, :num_outputs]

        def solve_tile(
            t: Array,
            state: tuple[Array, ...],
            corner_BB: Array = corner_BB,
            target_BR: Array = target_BR,
            weight_BR: Array = weight_BR,
            group_B: Array = group_B,
        ) -> tuple[Array, ...]:
            start = t * TILE

            def tile_of(rows_BR: Array) -> Array:
                return lax.dynamic_slice_in_dim(rows_BR, start, TILE)

            # The grid is spread here, tile by tile: laid out whole it would outweigh the slice.
            scale_TR = jnp.take(scale_GR, tile_of(group_B), axis=0)
            zero_TR = jnp.take(zero_GR, tile_of(group_B), axis=0)
            weight_TR = tile_of(weight_BR)
            rtn_codes_TR = encode(weight_TR, scale_TR, zero_TR, max_code)
            rtn_TR = weight_TR - decode(rtn_codes_TR, scale_TR, zero_TR)
            above_BT = lax.dynamic_slice_in_dim(corner_BB, start, TILE, axis=1)
            target_TR = tile_of(target_BR) + product(above_BT.T, state[1])
            solved = _solve_tile(
                target_TR, weight_TR, scale_TR, zero_TR, tile_of(above_BT), max_code
            )
            return tuple(
                lax.dynamic_update_slice_in_dim(rows_BR, rows_TR, start, 0)
                for rows_BR, rows_TR in zip(
                    state, (*solved, rtn_codes_TR.astype(jnp.uint8), rtn_TR), strict=True
                )
            )

        empty_BR = jnp.zeros_like(weight_BR)
        no_codes_BR = empty_BR.astype(jnp.uint8)
        codes_BR, errors_BR, deviations_BR, rtn_codes_BR, rtn_BR = lax.fori_loop(
            0,
            (b - a) // TILE,
            solve_tile,
            (no_codes_BR, empty_BR, empty_BR, no_codes_BR, empty_BR),
        )
        rtn_deviation_BR = pull_BR[:, num_outputs:] + product(corner_BB.T, rtn_BR)
        codes.append(codes_BR)
        rtn_codes.append(rtn_codes_BR)
        if index + 1 < len(panels):
            done.append(jnp.concatenate([errors_BR, rtn_BR], axis=1))
        # tr(Δ H Δᵀ) = tr(Δ (H + shift I) Δᵀ) - shift ‖Δ‖², column by column.
        pivot_B1 = pivot_C[a:b, None]
        loss_R += jnp.sum(pivot_B1 * deviations_BR**2 - shift * errors_BR**2, axis=0)
        rtn_loss_R += jnp.sum(pivot_B1 * rtn_deviation_BR**2 - shift * rtn_BR**2, axis=0)
        error_R += jnp.sum(errors_BR**2, axis=0)
        rtn_error_R += jnp.sum(rtn_BR**2, axis=0)

    rtn_kept_R = rtn_loss_R < loss_R
    codes_CR = jnp.where(rtn_kept_R, jnp.concatenate(rtn_codes), jnp.concatenate(codes))
    place_C = jnp.zeros_like(order_C).at[order_C].set(jnp.arange(order_C.shape[0]))
    dead_error_R = jnp.sum(jnp.where(live_C[:, None], 0.0, weight_CR) ** 2, axis=0)
    return SolvedSlice(
        jnp.take(codes_CR, place_C[:num_inputs], axis=0),
        # Rounding can leave a loss of nothing just below zero.
        jnp.maximum(jnp.minimum(loss_R, rtn_loss_R), 0.0),
        jnp.maximum(rtn_loss_R, 0.0),
        rtn_kept_R,
        jnp.where(rtn_kept_R, rtn_error_R, error_R) + dead_error_R,
        jnp.sum(weight_CR**2, axis=0),
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
        jnp.sum(weight_CR**2, axis=0),
    )
