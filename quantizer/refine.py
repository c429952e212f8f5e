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
from quantizer.factor import BLOCK, PANEL, TILE
from quantizer.gptq import SolvedSlice
from quantizer.grid import decode, encode


@jax.jit
def damped_hessian(gram_CC: Array, num_rows: Array, shift: Array) -> tuple[Array, ...]:
    """2·gram/num_rows + shift·I as panels of rows, padded to whole tiles, [panel, C'] each.

    Made once for all slices of one input: each would otherwise keep a copy of its own.
    """
    size = gram_CC.shape[0]
    padding = -size % TILE
    hessian_CC = gram_CC * (2.0 / num_rows) + shift * jnp.eye(size)
    # A padded input has no curvature.
    hessian_PP = jnp.pad(hessian_CC, ((0, padding), (0, padding)))
    return tuple(hessian_PP[a : a + PANEL] for a in range(0, size + padding, PANEL))


class _Grid(NamedTuple):
    """Where a weight may go: the slice's grid, each input's group and 1 / H_kk."""

    scale_GR: Array
    zero_GR: Array
    group_P: Array
    inverse_P: Array


# A program of its own within the other, so that blocks of one size are traced once.
@partial(jax.jit, static_argnames="max_code")
def _sweep_block(
    grid: _Grid,
    first: Array,
    pull_BR: Array,
    corner_BB: Array,
    restored_PR: Array,
    *,
    max_code: float,
) -> tuple[Array, Array]:
    """By how much each weight of the block from input `first` on moves, and the loss's change."""

    def tile_sweep(t: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        moved_BR, change_R = state
        start = t * TILE

        def tile_of(rows: Array, offset: Array | int = 0) -> Array:
            return lax.dynamic_slice_in_dim(rows, offset + start, TILE)

        rows_TB = tile_of(corner_BB)
        pull_TR = tile_of(pull_BR) + product(rows_TB, moved_BR)
        corner_TT = lax.dynamic_slice_in_dim(rows_TB, start, TILE, axis=1)
        restored_TR, inverse_T = tile_of(restored_PR, first), tile_of(grid.inverse_P, first)
        group_T = tile_of(grid.group_P, first)

        def column(k: Array, moved_TR: Array) -> Array:
            seen = product(lax.dynamic_slice_in_dim(corner_TT, k, 1), moved_TR)
            # Where this weight alone would like to be, all others held.
            wanted_R = restored_TR[k] + (pull_TR[k] + seen[0]) * inverse_T[k]
            scale_R, zero_R = grid.scale_GR[group_T[k]], grid.zero_GR[group_T[k]]
            code_R = encode(wanted_R, scale_R, zero_R, max_code)
            moved_R = restored_TR[k] - decode(code_R, scale_R, zero_R)
            moved: Array = lax.dynamic_update_index_in_dim(moved_TR, moved_R, k, 0)
            return moved

        moved_TR: Array = lax.fori_loop(0, TILE, column, jnp.zeros_like(pull_TR))
        # tr((E + M)ᵀ H (E + M)) - tr(Eᵀ H E), of these rows of M; sums by a product.
        gain_TR = moved_TR * (2.0 * pull_TR + product(corner_TT, moved_TR))
        return (
            lax.dynamic_update_slice_in_dim(moved_BR, moved_TR, start, 0),
            change_R + product(jnp.ones((1, TILE)), gain_TR)[0],
        )

    swept: tuple[Array, Array] = lax.fori_loop(
        0,
        pull_BR.shape[0] // TILE,
        tile_sweep,
        (jnp.zeros_like(pull_BR), jnp.zeros(pull_BR.shape[1])),
    )
    return swept


@partial(jax.jit, static_argnames=("weight_bits", "sweeps"))
def refine_slice(
    solved: SolvedSlice,
    weight_CR: Array,
    scale_GR: Array,
    zero_GR: Array,
    group_C: Array,
    live_C: Array,
    hessian_panels: tuple[Array, ...],
    shift: Array,
    *,
    weight_bits: int,
    sweeps: int,
) -> SolvedSlice:
    """Lower the damped loss of a solved slice; channels whose undamped loss rose stay as given.

    Args:
        solved: what the column loop found.
        weight_CR, scale_GR, zero_GR, group_C, live_C: as in `quantizer.gptq.solve_slice`.
        hessian_panels, shift: of `damped_hessian`, original input order.
        sweeps: times that every column is revisited.
    """
    num_inputs, num_outputs = weight_CR.shape
    padding = -num_inputs % TILE
    max_code = 2.0**weight_bits - 1
    weight_PR = jnp.pad(jnp.where(live_C[:, None], weight_CR, 0.0), ((0, padding), (0, 0)))
    starts = range(0, num_inputs + padding, PANEL)
    curvature_P = jnp.concatenate(
        [jnp.diagonal(rows_BP, a) for a, rows_BP in zip(starts, hessian_panels, strict=True)]
    )
    inverse_P = jnp.where(curvature_P > 0, 1.0 / curvature_P, 0.0)
    # A padded input is revisited, has nothing to gain, and stays as it is.
    grid = _Grid(scale_GR, zero_GR, jnp.pad(group_C, (0, padding)), inverse_P)

    def sweep(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        restored_PR, change_R = state
        for a, rows_BP in zip(starts, hessian_panels, strict=True):
            b = a + rows_BP.shape[0]
            pull_BR = product(rows_BP, weight_PR - restored_PR)
            moved: list[Array] = []
            for m in range(0, b - a, BLOCK):
                n = min(m + BLOCK, b - a)
                pull_MR = pull_BR[m:n]
                for i, moved_MR in enumerate(moved):
                    before = a + i * BLOCK
                    block_MM = rows_BP[m:n, before : before + BLOCK]
                    pull_MR = pull_MR + product(block_MM, moved_MR)
                corner_MM = rows_BP[m:n, a + m : a + n]
                moved_MR, gain_R = _sweep_block(
                    grid, jnp.int32(a + m), pull_MR, corner_MM, restored_PR, max_code=max_code
                )
                moved.append(moved_MR)
                change_R = change_R + gain_R
            after_BR = restored_PR[a:b] - jnp.concatenate(moved)
            restored_PR = lax.dynamic_update_slice_in_dim(restored_PR, after_BR, a, 0)
        return restored_PR, change_R

    def restored(codes_CR: Array) -> Array:
        codes = codes_CR.astype(jnp.float32)
        return decode(codes, jnp.take(scale_GR, group_C, 0), jnp.take(zero_GR, group_C, 0))

    before_PR = jnp.pad(restored(solved.codes_CR), ((0, padding), (0, 0)))
    after_PR, change_R = lax.fori_loop(0, sweeps, sweep, (before_PR, jnp.zeros(num_outputs)))

    # From the damped loss, which fell by -change, to the undamped one, which is judged.
    grown_R = jnp.sum((weight_PR - after_PR) ** 2 - (weight_PR - before_PR) ** 2, axis=0)
    loss_R = solved.loss_R + change_R - shift * grown_R
    better_R = loss_R < solved.loss_R
    kept_CR = jnp.where(better_R, after_PR, before_PR)[:num_inputs]
    # A code comes back exactly from the weight it stands for.
    codes_CR = encode(
        kept_CR, jnp.take(scale_GR, group_C, 0), jnp.take(zero_GR, group_C, 0), max_code
    )
    return SolvedSlice(
        codes_CR.astype(jnp.uint8),
        jnp.maximum(jnp.minimum(loss_R, solved.loss_R), 0.0),
        solved.rtn_loss_R,
        # A channel that began as rounded and was improved is no longer that.
        solved.rtn_kept_R & ~better_R,
        jnp.sum((weight_PR[:num_inputs] - kept_CR) ** 2, axis=0),
    )
