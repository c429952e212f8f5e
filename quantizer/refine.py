"""Coordinate descent on GPTQ's codes: each weight again, now that all the others are known.

GPTQ decides a column before it knows the rounding of those after it. Going over the columns once
more, each code becomes the best one for all the others as they stand (QuantEase, arXiv 2309.01885,
Alg. 1), so the loss can only fall. Same nesting as the column loop: one product a panel, a
small one a tile.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from quantizer.cholesky import product
from quantizer.factor import PANEL, TILE
from quantizer.gptq import SolvedSlice
from quantizer.grid import decode, encode


class _State(NamedTuple):
    """Codes, errors w - ŵ and the running change of the loss, while columns are revisited."""

    codes_CR: Array
    errors_CR: Array
    change_R: Array


@partial(jax.jit, static_argnames=("weight_bits", "sweeps"))
def refine_slice(
    solved: SolvedSlice,
    weight_CR: Array,
    scale_GR: Array,
    zero_GR: Array,
    group_C: Array,
    live_C: Array,
    gram_CC: Array,
    num_rows: Array,
    shift: Array,
    *,
    weight_bits: int,
    sweeps: int,
) -> SolvedSlice:
    """Lower the damped loss of a solved slice; channels whose undamped loss rose stay as given.

    Args:
        solved: what the column loop found.
        gram_CC, num_rows, shift: the Hessian 2·gram/num_rows + shift·I, original input order.
        sweeps: times that every column is revisited.
    """
    num_inputs, num_outputs = weight_CR.shape
    padding = -num_inputs % TILE
    max_code = 2.0**weight_bits - 1
    scale_CR = jnp.take(scale_GR, group_C, axis=0)
    zero_CR = jnp.take(zero_GR, group_C, axis=0)
    live_CR = jnp.where(live_C[:, None], weight_CR, 0.0)
    errors_CR = live_CR - decode(solved.codes_CR.astype(jnp.float32), scale_CR, zero_CR)

    def padded(array_CR: Array, fill: float = 0.0) -> Array:
        return jnp.pad(array_CR, ((0, padding), (0, 0)), constant_values=fill)

    # A padded input has no error and no curvature: it is revisited and left alone.
    weight_PR, scale_PR, zero_PR = padded(live_CR), padded(scale_CR, 1.0), padded(zero_CR)
    hessian_CC = gram_CC * (2.0 / num_rows) + shift * jnp.eye(num_inputs)
    hessian_CC = jnp.pad(hessian_CC, ((0, padding), (0, padding)))
    curvature_C = jnp.diagonal(hessian_CC)
    inverse_C = jnp.where(curvature_C > 0, 1.0 / curvature_C, 0.0)

    def sweep(_: Array, state: _State) -> _State:
        for a in range(0, num_inputs + padding, PANEL):
            b = min(a + PANEL, num_inputs + padding)
            state = panel_sweep(a, b, state)
        return state

    def panel_sweep(a: int, b: int, state: _State) -> _State:
        pull_BR = product(hessian_CC[a:b], state.errors_CR)
        before_BR = state.errors_CR[a:b]
        corner_BB = hessian_CC[a:b, a:b]

        def tile_sweep(t: Array, inner: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            codes_BR, errors_BR, change_R = inner
            start = t * TILE

            def tile_of(rows: Array, offset: int = 0) -> Array:
                return lax.dynamic_slice_in_dim(rows, offset + start, TILE)

            rows_TB = tile_of(corner_BB)
            pull_TR = tile_of(pull_BR) + product(rows_TB, errors_BR - before_BR)
            corner_TT = lax.dynamic_slice_in_dim(rows_TB, start, TILE, axis=1)
            weight_TR = tile_of(weight_PR, a)
            scale_TR, zero_TR = tile_of(scale_PR, a), tile_of(zero_PR, a)
            inverse_T, curvature_T = tile_of(inverse_C, a), tile_of(curvature_C, a)
            old_TR = tile_of(errors_BR)

            def column(k: Array, seen: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
                codes_TR, errors_TR, gain_R = seen
                moved_TR = errors_TR - old_TR
                pull_R = pull_TR[k] + jnp.sum(corner_TT[k][:, None] * moved_TR, axis=0)
                # Where this weight alone would like to be, all others held.
                wanted_R = weight_TR[k] - errors_TR[k] + pull_R * inverse_T[k]
                code_R = encode(wanted_R, scale_TR[k], zero_TR[k], max_code)
                error_R = weight_TR[k] - decode(code_R, scale_TR[k], zero_TR[k])
                step_R = error_R - errors_TR[k]
                gain_R = gain_R + step_R * (2.0 * pull_R + step_R * curvature_T[k])
                return (
                    lax.dynamic_update_index_in_dim(codes_TR, code_R.astype(jnp.uint8), k, 0),
                    lax.dynamic_update_index_in_dim(errors_TR, error_R, k, 0),
                    gain_R,
                )

            codes_TR, errors_TR, change_R = lax.fori_loop(
                0, TILE, column, (tile_of(codes_BR), old_TR, change_R)
            )
            return (
                lax.dynamic_update_slice_in_dim(codes_BR, codes_TR, start, 0),
                lax.dynamic_update_slice_in_dim(errors_BR, errors_TR, start, 0),
                change_R,
            )

        codes_BR, errors_BR, change_R = lax.fori_loop(
            0, (b - a) // TILE, tile_sweep, (state.codes_CR[a:b], before_BR, state.change_R)
        )
        return _State(
            lax.dynamic_update_slice_in_dim(state.codes_CR, codes_BR, a, 0),
            lax.dynamic_update_slice_in_dim(state.errors_CR, errors_BR, a, 0),
            change_R,
        )

    start = _State(padded(solved.codes_CR), padded(errors_CR), jnp.zeros(num_outputs))
    end = lax.fori_loop(0, sweeps, sweep, start)

    # From the damped loss, which fell by -change, to the undamped one, which is judged.
    before_R = jnp.sum(start.errors_CR**2, axis=0)
    after_R = jnp.sum(end.errors_CR**2, axis=0)
    loss_R = solved.loss_R + end.change_R - shift * (after_R - before_R)
    better_R = loss_R < solved.loss_R
    codes_CR = jnp.where(better_R, end.codes_CR[:num_inputs], solved.codes_CR)
    restored_CR = decode(codes_CR.astype(jnp.float32), scale_CR, zero_CR)
    return SolvedSlice(
        codes_CR,
        jnp.maximum(jnp.minimum(loss_R, solved.loss_R), 0.0),
        solved.rtn_loss_R,
        # A channel that began as rounded and was improved is no longer that.
        solved.rtn_kept_R & ~better_R,
        jnp.sum((live_CR - restored_CR) ** 2, axis=0),
    )
