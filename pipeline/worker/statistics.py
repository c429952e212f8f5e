"""Calibration statistics of a layer's input, summed on the device.

These programs are compiled apart from those that compute the input, so that summing changes no bit
of the activations: a block that runs again without it, to resume, gives the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpy.typing import NDArray

from pipeline.plan import InputGroup
from pipeline.recipe.recipe import StatisticsKind
from pipeline.worker.memory import make_room
from quantizer import CalibrationStatistics, HessianSum, MagnitudeSum

# A Gram is symmetric: cut into this many bands of rows, each is multiplied only from the diagonal
# on, which takes 10/16 of the flops.
_GRAM_BANDS = 4
_MIN_BAND_ROWS = 128

Carry = tuple[Array, ...]
"""Unfinished statistics on the device: for a Hessian the bands of the Gram, for magnitudes sum, sum
of squares and maximum per channel; last the number of rows."""


def sum_inputs(
    inputs: Iterable[tuple[Array, NDArray[np.bool_]]],
    group: InputGroup,
    input_axes: tuple[int, ...],
) -> CalibrationStatistics:
    """Statistics over the micro-batches of a group's input.

    Args:
        inputs: each as Keras gives it, [batch, sequence, …], and its mask, [batch, sequence]; rows
            where that is false are left out.
        input_axes: the axes that are contracted with the kernel, counted from the end.
    """
    is_hessian, size = group.statistics == "hessian", group.in_features
    if is_hessian:
        make_room(4 * size**2)
        sums = [jnp.zeros((b - a, size - a)) for a, b in _bands(size)]
    else:
        sums = [jnp.zeros(size) for _ in range(3)]
    carry: Carry = (*sums, jnp.int32(0))
    for array, mask in inputs:
        # A program of its own for no padding saves a pass over the rows.
        padded = None if mask.all() else mask
        carry = _add(carry, array, padded, mask.size, group.statistics, input_axes)
    if is_hessian:
        return HessianSum(np.asarray(_whole(carry[:-1])), int(carry[-1]))
    total, square, largest, num_rows = map(np.asarray, carry)
    return MagnitudeSum(total, square, largest, int(num_rows))


@partial(jax.jit, static_argnames=("statistics", "input_axes"), donate_argnums=(0,))
def _add(
    carry: Carry,
    inputs: Array,
    mask: Array | None,
    num_all: Array,
    statistics: StatisticsKind,
    input_axes: tuple[int, ...],
) -> Carry:
    last = tuple(range(-len(input_axes), 0))
    moved = jnp.moveaxis(inputs, input_axes, last)
    rows = moved.reshape(*moved.shape[: -len(last)], -1)
    if statistics != "hessian" or rows.dtype != jnp.bfloat16:
        rows = rows.astype(jnp.float32)
    if mask is None:
        num_rows = carry[-1] + num_all
    else:
        # Not a product with the mask, since padding may hold infinity.
        rows = jnp.where(mask[..., None], rows, jnp.zeros((), rows.dtype))
        num_rows = carry[-1] + jnp.sum(mask, dtype=jnp.int32)
    rows_NC = rows.reshape(-1, rows.shape[-1])
    if statistics == "hessian":
        sums = (
            band + _product(rows_NC[:, a:b].T, rows_NC[:, a:])
            for band, (a, b) in zip(carry, _bands(rows_NC.shape[1]), strict=False)
        )
        return *sums, num_rows
    size_NC = jnp.abs(rows_NC)
    return (
        carry[0] + jnp.sum(size_NC, axis=0),
        carry[1] + jnp.sum(jnp.square(size_NC), axis=0),
        jnp.maximum(carry[2], jnp.max(size_NC, axis=0)),
        num_rows,
    )


def _product(left: Array, right: Array) -> Array:
    """In float32, of which nothing is lost before the sum.

    Products of bfloat16 are exact in float32, in which tensor cores add them up; of float32 they
    are so only at the highest precision, without TF32.
    """
    return jnp.matmul(
        left, right, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


@jax.jit
def _whole(bands: Carry) -> Array:
    """The Gram, [C, C], exactly symmetric, from its bands."""
    upper = jnp.triu(
        jnp.concatenate(
            [jnp.pad(band, ((0, 0), (bands[0].shape[1] - band.shape[1], 0))) for band in bands]
        )
    )
    return upper + jnp.triu(upper, 1).T


def _bands(in_features: int) -> list[tuple[int, int]]:
    """Rows [a, b) of each band, which holds the columns from a on."""
    if in_features < _GRAM_BANDS * _MIN_BAND_ROWS:
        return [(0, in_features)]
    edges = [in_features * i // _GRAM_BANDS for i in range(_GRAM_BANDS + 1)]
    return list(pairwise(edges))
