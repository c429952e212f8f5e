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
from quantizer.experts import ExpertHessians

# A Gram is symmetric: cut into this many bands of rows, each is multiplied only from the diagonal
# on, which takes 10/16 of the flops.
_GRAM_BANDS = 4
_MIN_BAND_ROWS = 128
# Of one expert, multiplied at once.
_FEWEST_ROWS = 16
_MOST_ROWS = 512

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


def sum_routed(
    inputs: Iterable[tuple[Array, Array, NDArray[np.bool_]]], in_features: int, experts: range
) -> ExpertHessians:
    """Statistics of some experts over the micro-batches of the inputs of all.

    Each is summed over the rows that the router sends to it. They are gathered in blocks of one
    expert, so that a sum costs what these rows do, and not what all rows would for all experts.
    Whatever other experts are summed beside it, an expert's sum has the same bits.

    Args:
        inputs: each as Keras gives it, [experts, rows, in_features]; the router's choice of experts
            for each row, [rows, experts per row]; and a mask, [rows]: rows where that is false are
            left out.
    """
    make_room(4 * len(experts) * in_features**2)
    sums = [jnp.zeros((len(experts), b - a, in_features - a)) for a, b in _bands(in_features)]
    carry = (*sums, jnp.zeros(len(experts), jnp.int32))
    for array, choice, mask in inputs:
        num_all, per_row = len(array), choice.shape[1]
        block = _block_rows(mask.size * per_row, num_all)
        carry = _add_routed(carry, array, choice, mask, experts.start, block_rows=block)
    return ExpertHessians(
        np.asarray(_whole(carry[:-1])), np.asarray(carry[-1], np.int64), experts.start
    )


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


def _block_rows(num_pairs: int, num_experts: int) -> int:
    """Rows of a block: a power of two, about as many as an expert has of a micro-batch."""
    expected = max(1, num_pairs // num_experts)
    return min(_MOST_ROWS, max(_FEWEST_ROWS, 1 << (expected - 1).bit_length()))


@partial(jax.jit, static_argnames=("block_rows",), donate_argnums=(0,))
def _add_routed(
    carry: tuple[Array, ...],
    inputs: Array,
    choice: Array,
    mask: Array,
    first: Array,
    *,
    block_rows: int,
) -> tuple[Array, ...]:
    num_rows, per_row = choice.shape
    in_features, num_experts = inputs.shape[-1], len(carry[-1])
    # Pairs of a row and an expert, sorted by expert; those of other experts and padding come last.
    expert_P = jnp.where(mask[:, None], choice - first, num_experts).reshape(-1)
    expert_P = jnp.where(expert_P < 0, num_experts, jnp.minimum(expert_P, num_experts))
    row_P = jnp.argsort(expert_P, stable=True) // per_row
    count_E = jnp.bincount(expert_P, length=num_experts + 1)[:-1].astype(jnp.int32)
    blocks_E = -(-count_E // block_rows)
    end_E, end_block_E = jnp.cumsum(count_E), jnp.cumsum(blocks_E)

    def add_block(block: Array, bands: tuple[Array, ...]) -> tuple[Array, ...]:
        expert = jnp.searchsorted(end_block_E, block, side="right")
        in_expert = block - (end_block_E[expert] - blocks_E[expert])
        start = end_E[expert] - count_E[expert] + in_expert * block_rows
        pair_B = start + jnp.arange(block_rows)
        row_B = row_P[jnp.minimum(pair_B, num_rows * per_row - 1)]
        rows_BC = inputs[first + expert, row_B]
        if rows_BC.dtype != jnp.bfloat16:
            rows_BC = rows_BC.astype(jnp.float32)
        # Not a product with the mask, since rows of other experts may hold infinity.
        kept_B1 = (pair_B < end_E[expert])[:, None]
        rows_BC = jnp.where(kept_B1, rows_BC, jnp.zeros((), rows_BC.dtype))
        return tuple(
            band.at[expert].add(_product(rows_BC[:, a:b].T, rows_BC[:, a:]))
            for band, (a, b) in zip(bands, _bands(in_features), strict=True)
        )

    bands = lax.fori_loop(0, end_block_E[-1], add_block, carry[:-1])
    return *bands, carry[-1] + count_E


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
    """The Gram, [..., C, C], exactly symmetric, from its bands."""
    size = bands[0].shape[-1]
    before = [(0, 0)] * (bands[0].ndim - 1)
    padded = [jnp.pad(band, (*before, (size - band.shape[-1], 0))) for band in bands]
    upper = jnp.triu(jnp.concatenate(padded, axis=-2))
    return upper + jnp.matrix_transpose(jnp.triu(upper, 1))


def _bands(in_features: int) -> list[tuple[int, int]]:
    """Rows [a, b) of each band, which holds the columns from a on."""
    if in_features < _GRAM_BANDS * _MIN_BAND_ROWS:
        return [(0, in_features)]
    edges = [in_features * i // _GRAM_BANDS for i in range(_GRAM_BANDS + 1)]
    return list(pairwise(edges))
