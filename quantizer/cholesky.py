"""Cholesky factor and its inverse, for the corner of one panel.

LAPACK's threaded kernels stall by a factor of a hundred when another process holds a core, from
about 256 columns on. Here it sees 128 columns at most, where it stays on one thread; all else is
matrix products.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

_LEAF = 128
_BLOCK = 16


def product(left: Array, right: Array) -> Array:
    """A matrix product in full float32: HIGHEST keeps TF32 out."""
    return jnp.matmul(left, right, precision=lax.Precision.HIGHEST)


@jax.jit
def cholesky_with_inverse(matrix_NN: Array) -> tuple[Array, Array]:
    """L and L⁻¹ with L Lᵀ = matrix, L lower triangular; NaN where the matrix is not definite.

    Args:
        matrix_NN: [N, N], symmetric (its lower triangle is read), N a multiple of 16.
    """
    size = matrix_NN.shape[0]
    if size <= _LEAF:
        lower = lax.linalg.cholesky(matrix_NN, symmetrize_input=False)
        return lower, _invert(lower)
    half = size // 2 // _BLOCK * _BLOCK
    upper_left, upper_inverse = cholesky_with_inverse(matrix_NN[:half, :half])
    below = product(matrix_NN[half:, :half], upper_inverse.T)
    rest = matrix_NN[half:, half:] - product(below, below.T)
    lower_right, lower_inverse = cholesky_with_inverse(rest)
    corner = -product(product(lower_inverse, below), upper_inverse)
    return (
        _stack(upper_left, below, lower_right),
        _stack(upper_inverse, corner, lower_inverse),
    )


def _stack(upper_left: Array, below: Array, lower_right: Array) -> Array:
    zeros = jnp.zeros((*below.shape[:-2], below.shape[-1], below.shape[-2]), below.dtype)
    top = jnp.concatenate([upper_left, zeros], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([below, lower_right], axis=-1)], axis=-2)


def _invert(lower_NN: Array) -> Array:
    """The inverse of a lower triangle: all diagonal blocks at once, then pairs of pairs."""
    count = lower_NN.shape[0]
    blocks = 1 << (count // _BLOCK - 1).bit_length()
    padding = blocks * _BLOCK - count
    lower_NN = jnp.pad(lower_NN, ((0, padding), (0, padding)))
    lower_NN = lower_NN + jnp.diag(jnp.pad(jnp.zeros(count), (0, padding), constant_values=1.0))

    def diagonal(rows: int, columns: int, size: int) -> Array:
        """The `size`-wide blocks on the diagonal, or those below every other of them."""
        grid = lower_NN.reshape(
            lower_NN.shape[0] // size, size, lower_NN.shape[0] // size, size
        ).swapaxes(1, 2)
        step = 1 if rows == columns else 2
        index = jnp.arange(0, grid.shape[0], step)
        return grid[index + rows, index + columns]

    tiles = diagonal(0, 0, _BLOCK)
    identity = jnp.broadcast_to(jnp.eye(_BLOCK), tiles.shape)

    def row(k: Array, inverse: Array) -> Array:
        # Rows not yet reached are zero, and so is the triangle's upper half.
        known = jnp.einsum("bj,bjc->bc", tiles[:, k], inverse, precision=lax.Precision.HIGHEST)
        return inverse.at[:, k].set((identity[:, k] - known) / tiles[:, k, k, None])

    inverse = jax.lax.fori_loop(0, _BLOCK, row, jnp.zeros_like(tiles))
    size = _BLOCK
    while inverse.shape[0] > 1:
        first, second = inverse[0::2], inverse[1::2]
        below = -product(product(second, diagonal(1, 0, size)), first)
        inverse = _stack(first, below, second)
        size *= 2
    inverted: Array = inverse[0, :count, :count]
    return inverted
