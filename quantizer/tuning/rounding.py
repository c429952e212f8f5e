"""What training may change of a quantized kernel, and the weights that it then stands for.

A kernel is trained in the stored matrix, [columns, rows] as stock Keras keeps it (see
`quantizer.problem.RowGroups`): each code gets a continuous offset that is added before rounding
(AutoRound, arXiv 2309.05516, Eq. 3), each group's scale a factor exp(log_scale). Rounding has the
gradient of the identity (the straight-through estimator, arXiv 1308.3432). Before the first step
the codes and scales are the solver's.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from quantizer.qparams import decode

MOST_OFFSET = 1.0
"""In steps of the grid, from the solver's code: a code moves to a neighbour at most."""
_CELL = 0.499
"""How far a weight may go beyond the least and the largest code, to which it still rounds."""


class Grid(NamedTuple):
    """A kernel as the solver left it, which training starts from.

    Attributes:
        code_RC: uint8; offsets are relative to it.
        scale_RG, zero_RG: float32, of runs of rows; zero points stay what they are.
    """

    code_RC: Any
    scale_RG: Any
    zero_RG: Any


class Steps(NamedTuple):
    """What is trained of a kernel, float32.

    Attributes:
        offset_RC: of the codes, in steps of the grid.
        log_scale_RG: the logarithm of each scale's factor.
    """

    offset_RC: Any
    log_scale_RG: Any


def start(grid: Grid) -> Steps:
    """The steps that change nothing: each weight in the middle of its code's cell.

    Where it lay before it was rounded is no better a place: the solver chose the code for the
    errors of others, and codes that flip at once fit the windows of calibration alone.
    """
    return Steps(np.zeros(grid.code_RC.shape, np.float32), np.zeros_like(grid.scale_RG))


def codes(grid: Grid, steps: Steps, weight_bits: int) -> Array:
    """The trained codes, whole float32 numbers, with the gradient of the offsets."""
    place_RC = grid.code_RC.astype(jnp.float32) + steps.offset_RC
    return _rounded(place_RC, 2.0**weight_bits - 1)


def scales(grid: Grid, steps: Steps, scale_dtype: str) -> Array:
    """The trained scales, float32 rounded to the dtype that stores them."""
    return stored(grid.scale_RG * jnp.exp(steps.log_scale_RG), scale_dtype)


def weights(grid: Grid, steps: Steps, weight_bits: int, group_size: int, scale_dtype: str) -> Array:
    """The weights that stock Keras will decode, [columns, rows], float32."""
    rows = grid.code_RC.shape[1]
    scale_RC = _by_row(scales(grid, steps, scale_dtype), rows, group_size)
    zero_RC = _by_row(jnp.asarray(grid.zero_RG), rows, group_size)
    return decode(codes(grid, steps, weight_bits), scale_RC, zero_RC)


def _by_row(of_group_RG: Array, rows: int, group_size: int) -> Array:
    """Each row's value of its group; unlike a gather's, the gradient is a plain sum."""
    size = rows if group_size == -1 else group_size
    wide_RGS = jnp.broadcast_to(of_group_RG[:, :, None], (*of_group_RG.shape, size))
    return wide_RGS.reshape(len(of_group_RG), -1)[:, :rows]


def bounded(grid: Grid, steps: Steps, weight_bits: int) -> Steps:
    """The steps, with offsets that leave no code more than a neighbour away.

    Nor do they leave the cells of the least and the largest code, from where they could not return.
    """
    code_RC = grid.code_RC.astype(jnp.float32)
    least_RC = jnp.maximum(-MOST_OFFSET, -_CELL - code_RC)
    most_RC = jnp.minimum(MOST_OFFSET, 2.0**weight_bits - 1 + _CELL - code_RC)
    return Steps(jnp.clip(steps.offset_RC, least_RC, most_RC), steps.log_scale_RG)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _rounded(place: Array, max_code: float) -> Array:
    return jnp.clip(jnp.round(place), 0, max_code)


def _rounded_forward(place: Array, max_code: float) -> tuple[Array, None]:
    return _rounded(place, max_code), None


def _straight_through(_: object, __: None, gradient: Array) -> tuple[Array]:
    return (gradient,)


_rounded.defvjp(_rounded_forward, _straight_through)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def stored(value: Array, dtype: str) -> Array:
    """The value rounded to a dtype, as float32, with the gradient of the identity."""
    # XLA may drop a conversion that is undone at once.
    narrow: Array = lax.optimization_barrier(value.astype(dtype))
    return narrow.astype(jnp.float32)


def _stored_forward(value: Array, dtype: str) -> tuple[Array, None]:
    return stored(value, dtype), None


stored.defvjp(_stored_forward, _straight_through)
