"""The column loop's innermost steps on GPUs: one kernel visits a block of columns, one by one.

As XLA's loops every column costs a dozen launches. Here one launch serves a whole block: each
thread keeps one output channel, so that threads never wait for each other, and a tile's errors stay
in its registers. The arithmetic is that of `column_loop` and `refine` on CPUs, in float32.

A vector has as many elements as the program has threads. Each thread therefore reads back only
what it wrote itself, and no barrier is needed between a tile's errors and their later use.

All blocks of a panel are one kernel, which is compiled once: their places are among its arguments.
Off a GPU it is interpreted, which is slow and for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from quantizer.gptq.factor import block_size
from quantizer.qparams import decode

THREADS = 32
"""Output channels of one program: a warp. There are too few of them to fill larger ones."""
TILE = 16
"""Columns solved one by one whose results stay in registers."""
STEP = 4
"""Columns of earlier tiles that are read together, so that one wait serves them all."""
_Ref: TypeAlias = Any
"""Stands for an array in the GPU's memory, of which a kernel reads and writes parts."""
_Vector: TypeAlias = Array
_Sums: TypeAlias = tuple[_Vector, ...]
_Given: TypeAlias = tuple[Array, ...]
_Read: TypeAlias = Callable[[Array], _Given]
_Column: TypeAlias = Callable[[_Given, _Vector, _Sums], tuple[tuple[_Vector, ...], _Sums]]


class Panel(NamedTuple):
    """Weights and grid of a panel's columns, [columns, slice] each, float32.

    The number of channels in a slice is a multiple of THREADS.
    """

    weight_PR: Array
    scale_PR: Array
    zero_PR: Array


def solve_block(
    panel: Panel,
    first: int,
    correction: Array,
    corner_PP: Array,
    pivot_P: Array,
    limits: Array,
    loss_2R: Array,
    error_2R: Array,
) -> tuple[Array, Array, Array, Array]:
    """Quantize one of a panel's blocks of columns, by GPTQ and by rounding.

    Args:
        first: the block's first column in the panel.
        correction: the corrections by all columns before the block, [B or more, 2, slice].
        corner_PP: Aᵀ between the panel's columns.
        pivot_P: D; 0 at inputs whose errors cost nothing.
        limits: the largest code, and what was added to H's diagonal.
        loss_2R, error_2R: output error under the undamped Hessian and Σ(w - ŵ)², of all columns
            before.

    Returns:
        w - ŵ, [B, 2, slice]; the codes, uint8; and the two sums, with the block's columns.
    """
    columns, num_outputs = panel.weight_PR.shape
    size = block_size(columns)
    of_panel = pl.BlockSpec((columns, THREADS), lambda r, _: (0, r))
    whole = pl.BlockSpec()
    of_block = pl.BlockSpec((size, None, THREADS), lambda r, v: (0, v, r))
    of_channel = pl.BlockSpec((None, THREADS), lambda r, v: (v, r))
    solved: tuple[Array, Array, Array, Array] = pl.pallas_call(
        _solve,
        out_shape=(
            jax.ShapeDtypeStruct((size, 2, num_outputs), jnp.float32),
            jax.ShapeDtypeStruct((size, 2, num_outputs), jnp.uint8),
            jax.ShapeDtypeStruct(loss_2R.shape, jnp.float32),
            jax.ShapeDtypeStruct(error_2R.shape, jnp.float32),
        ),
        grid=(num_outputs // THREADS, 2),
        in_specs=[
            whole,
            of_panel,
            of_panel,
            of_panel,
            of_block,
            whole,
            whole,
            whole,
            of_channel,
            of_channel,
        ],
        out_specs=(of_block, of_block, of_channel, of_channel),
        **_compilation(),
    )(_place(first), *panel, correction, corner_PP, pivot_P, limits, loss_2R, error_2R)
    return solved


def refine_block(
    panel: Panel,
    first: int,
    missing_PR: Array,
    correction: Array,
    corner_PP: Array,
    inverse_P: Array,
    limits: Array,
    change_R: Array,
) -> tuple[Array, Array]:
    """Visit one of a panel's blocks of columns once, giving each code its best value.

    Args:
        first: the block's first column in the panel.
        missing_PR: w - ŵ so far.
        correction: H's rows of the block times w - ŵ of all inputs, [B or more, slice].
        corner_PP: the damped Hessian between the panel's columns.
        inverse_P: one by its diagonal; 0 where that is 0.
        limits: the largest code.
        change_R: the damped loss's change so far.

    Returns:
        How far w - ŵ moved, [B, slice]; the change, with the block's.
    """
    columns, num_outputs = panel.weight_PR.shape
    size = block_size(columns)
    of_panel = pl.BlockSpec((columns, THREADS), lambda r: (0, r))
    whole = pl.BlockSpec()
    of_block = pl.BlockSpec((size, THREADS), lambda r: (0, r))
    of_channel = pl.BlockSpec((THREADS,), lambda r: (r,))
    refined: tuple[Array, Array] = pl.pallas_call(
        _refine,
        out_shape=(
            jax.ShapeDtypeStruct((size, num_outputs), jnp.float32),
            jax.ShapeDtypeStruct(change_R.shape, jnp.float32),
        ),
        grid=(num_outputs // THREADS,),
        in_specs=[
            whole,
            of_panel,
            of_panel,
            of_panel,
            of_panel,
            of_block,
            whole,
            whole,
            whole,
            of_channel,
        ],
        out_specs=(of_block, of_channel),
        **_compilation(),
    )(_place(first), *panel, missing_PR, correction, corner_PP, inverse_P, limits, change_R)
    return refined


def _place(first: int) -> Array:
    return jnp.full(1, first, jnp.int32)


def _compilation() -> dict[str, Any]:
    return {
        "compiler_params": triton.CompilerParams(num_warps=THREADS // 32, num_stages=1),
        "interpret": jax.default_backend() == "cpu",
    }


def _solve(
    place: _Ref,
    weight: _Ref,
    scale: _Ref,
    zero: _Ref,
    correction: _Ref,
    corner: _Ref,
    pivot: _Ref,
    limits: _Ref,
    loss: _Ref,
    error: _Ref,
    errors: _Ref,
    codes: _Ref,
    loss_after: _Ref,
    error_after: _Ref,
) -> None:
    """One program of `solve_block`: some channels, by GPTQ (0) or by rounding (1)."""
    first, max_code, shift = place[0], limits[0], limits[1]
    corrected = 1.0 - pl.program_id(1).astype(jnp.float32)

    def read(k: Array) -> _Given:
        return weight[first + k, :], scale[first + k, :], zero[first + k, :], pivot[first + k]

    def column(given: _Given, seen: _Vector, sums: _Sums) -> tuple[tuple[_Vector, ...], _Sums]:
        weight_R, scale_R, zero_R, pivot_1 = given
        damped, squares, counted = sums
        code_R = _nearest(weight_R + corrected * seen, scale_R, zero_R, max_code)
        error_R = weight_R - decode(code_R, scale_R, zero_R)
        # w̃ - ŵ: with a unit diagonal it includes the column's own error.
        deviation_R, square_R = seen + error_R, error_R * error_R
        pivot_R = jnp.broadcast_to(pivot_1, (THREADS,))
        return (error_R, code_R), (
            damped + pivot_R * (deviation_R * deviation_R),
            squares + square_R,
            counted + jnp.where(pivot_R > 0, square_R, 0.0),
        )

    damped, squares, counted = _visit(correction, corner, first, (errors, codes), read, column, 3)
    # tr(Δ H Δᵀ) = tr(Δ (H + shift I) Δᵀ) - shift ‖Δ‖².
    loss_after[:] = loss[:] + damped - shift * counted
    error_after[:] = error[:] + squares


def _refine(
    place: _Ref,
    weight: _Ref,
    scale: _Ref,
    zero: _Ref,
    missing: _Ref,
    correction: _Ref,
    corner: _Ref,
    inverse: _Ref,
    limits: _Ref,
    change: _Ref,
    moved: _Ref,
    change_after: _Ref,
) -> None:
    """One program of `refine_block`: some channels."""
    first, max_code = place[0], limits[0]

    def read(k: Array) -> _Given:
        decoded_R = weight[first + k, :] - missing[first + k, :]
        grid = scale[first + k, :], zero[first + k, :]
        return decoded_R, *grid, inverse[first + k], corner[first + k, first + k]

    def column(given: _Given, seen: _Vector, sums: _Sums) -> tuple[tuple[_Vector, ...], _Sums]:
        decoded_R, scale_R, zero_R, inverse_1, curvature_1 = given
        # The best value of this weight alone, all others held.
        code_R = _nearest(decoded_R + seen * inverse_1, scale_R, zero_R, max_code)
        moved_R = decoded_R - decode(code_R, scale_R, zero_R)
        # tr((E + M)ᵀ H (E + M)) - tr(Eᵀ H E): `seen` holds what earlier columns of M add.
        return (moved_R,), (sums[0] + moved_R * (2.0 * seen + curvature_1 * moved_R),)

    (gain,) = _visit(correction, corner, first, (moved,), read, column, 1)
    change_after[:] = change[:] + gain


def _visit(
    correction: _Ref,
    corner: _Ref,
    start: Array,
    results: tuple[_Ref, ...],
    read: _Read,
    column: _Column,
    num_sums: int,
) -> _Sums:
    """Visit a block's columns in order, tile by tile.

    So few threads wait for whatever is read as it is needed. All is therefore read well before.

    Args:
        correction: by all columns before the block, [B, THREADS].
        corner: what a column adds to later ones for each unit of its first result.
        start: the block's first column in the panel.
        results: of each column, to be written, [B, THREADS] each.
        read: what a column needs, by its number in the block.
        column: from that, its correction, and the sums so far: its results, and the sums.

    Returns:
        the sums.
    """

    def tile(t: Array, sums: _Sums) -> _Sums:
        first = t * TILE
        given = [read(first + k) for k in range(TILE)]

        def earlier(i: Array, pending: Sequence[_Vector]) -> list[_Vector]:
            known = [results[0][i * STEP + j, :] for j in range(STEP)]
            shares = [
                [corner[start + first + k, start + i * STEP + j] for j in range(STEP)]
                for k in range(TILE)
            ]
            pending = list(pending)
            for k, of_column in enumerate(shares):
                for share, known_R in zip(of_column, known, strict=True):
                    pending[k] = pending[k] + share * known_R
            return pending

        pending = [correction[first + k, :] for k in range(TILE)]
        pending = lax.fori_loop(0, first // STEP, earlier, pending)
        done: list[tuple[_Vector, ...]] = []
        for k in range(TILE):
            later = range(k + 1, TILE)
            shares = [corner[start + first + m, start + first + k] for m in later]
            found, sums = column(given[k], pending[k], sums)
            for m, share in zip(later, shares, strict=True):
                pending[m] = pending[m] + share * found[0]
            done.append(found)
        # No write before, so that a tile's reads need not wait for one.
        for k, found in enumerate(done):
            for result, result_R in zip(results, found, strict=True):
                result[first + k, :] = result_R.astype(result.dtype)
        return sums

    none = tuple(jnp.zeros(THREADS, jnp.float32) for _ in range(num_sums))
    sums: _Sums = lax.fori_loop(0, results[0].shape[0] // TILE, tile, none)
    return sums


def _nearest(weight_R: _Vector, scale_R: _Vector, zero_R: _Vector, max_code: Array) -> _Vector:
    """`qparams.encode`, without the rounding to the nearest that Pallas lacks on GPUs."""
    ratio_R = weight_R / scale_R
    below_R = jnp.floor(ratio_R)
    rest_R, is_odd = ratio_R - below_R, below_R > 2.0 * jnp.floor(0.5 * below_R)
    up = (rest_R > 0.5) | ((rest_R == 0.5) & is_odd)
    return jnp.clip(jnp.where(up, below_R + 1.0, below_R) + zero_R, 0.0, max_code)
