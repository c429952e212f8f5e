"""What is summed of a layer's input over calibration rows, on the device where it lies.

These programs are apart from those that compute the input, so that adding up changes no bit of
what goes on: a block that is run again, to resume, gives the same activations without them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pipeline.recipe.recipe import Statistics
from quantizer import HessianSum, MagnitudeSum

# A Gram is symmetric: of so many column blocks only those on and right of the diagonal are
# multiplied, 10/16 of the flops.
_GRAM_BLOCKS = 4
_SMALLEST_GRAM_BLOCK = 128

Sums = HessianSum | MagnitudeSum
Carry = tuple[Array, ...]


def empty(statistics: Statistics, in_features: int) -> Carry:
    """Sums over no rows."""
    if statistics == "hessian":
        return jnp.zeros((in_features, in_features)), jnp.int32(0)
    return jnp.zeros(in_features), jnp.zeros(in_features), jnp.zeros(in_features), jnp.int32(0)


@partial(jax.jit, static_argnames=("statistics", "input_axes"), donate_argnums=(0,))
def add(
    carry: Carry,
    inputs: Array,
    mask: Array,
    *,
    statistics: Statistics,
    input_axes: tuple[int, ...],
) -> Carry:
    """Sums with one micro-batch more; `carry` is used up.

    Args:
        inputs: a layer's input, as Keras gives it, [batch, sequence, …].
        mask: [batch, sequence]; rows where it is false are left out.
        input_axes: the axes of `inputs` that are summed with the kernel, counted from its end.
    """
    last = tuple(range(-len(input_axes), 0))
    moved = jnp.moveaxis(inputs, input_axes, last)
    rows = moved.reshape(*moved.shape[: -len(last)], -1).astype(jnp.float32)
    # Chosen, not multiplied: padding may hold infinity.
    rows_NC = jnp.where(mask[..., None], rows, 0.0).reshape(-1, rows.shape[-1])
    num_rows = carry[-1] + jnp.sum(mask, dtype=jnp.int32)
    if statistics == "hessian":
        return carry[0] + gram(rows_NC), num_rows
    size_NC = jnp.abs(rows_NC)
    return (
        carry[0] + jnp.sum(size_NC, axis=0),
        carry[1] + jnp.sum(jnp.square(size_NC), axis=0),
        jnp.maximum(carry[2], jnp.max(size_NC, axis=0)),
        num_rows,
    )


def finish(statistics: Statistics, carry: Carry) -> Sums:
    """Sums as the solvers take them."""
    return _FINISH[statistics](*(np.asarray(array) for array in carry))


def gram(rows_NC: Array) -> Array:
    """Σ xᵀx in full float32, [C, C], exactly symmetric."""
    count = rows_NC.shape[1]
    if count < _GRAM_BLOCKS * _SMALLEST_GRAM_BLOCK:
        return jnp.matmul(rows_NC.T, rows_NC, precision=lax.Precision.HIGHEST)
    edges = [count * i // _GRAM_BLOCKS for i in range(_GRAM_BLOCKS + 1)]
    bands = [
        jnp.pad(
            jnp.matmul(rows_NC[:, a:b].T, rows_NC[:, a:], precision=lax.Precision.HIGHEST),
            ((0, 0), (a, 0)),
        )
        for a, b in pairwise(edges)
    ]
    upper = jnp.triu(jnp.concatenate(bands))
    return upper + jnp.triu(upper, 1).T


_FINISH: Mapping[str, Callable[..., Sums]] = {
    "hessian": lambda gram_CC, num_rows: HessianSum(gram_CC, int(num_rows)),
    "magnitudes": lambda total, square, largest, num_rows: MagnitudeSum(
        total, square, largest, int(num_rows)
    ),
}
