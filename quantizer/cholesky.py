"""Cholesky factor and its inverse, for the corner of one panel.

LAPACK's threaded kernels stall by a factor of a hundred when another process holds a core, from
about 256 columns on. Here it sees leaves of at most 160, where it stays on one thread; all else is
matrix products. Each step is a program of its own: there is one for all leaves of a size.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from quantizer.program import program

_LARGEST_LEAF = 160
_ROWS = 16


def product(left: Array, right: Array) -> Array:
    """A matrix product in full float32: HIGHEST keeps TF32 out."""
    return jnp.matmul(left, right, precision=lax.Precision.HIGHEST)


def cholesky(matrix_NN: Array) -> Array:
    """L of `cholesky_with_inverse`, in half the time."""
    if matrix_NN.shape[0] <= _LARGEST_LEAF:
        return _leaf(matrix_NN)
    upper, upper_inverse = cholesky_with_inverse(_upper_half(matrix_NN))
    below, rest = _lower_half(matrix_NN, upper_inverse)
    return _stack(upper, below, cholesky(rest))


def cholesky_with_inverse(matrix_NN: Array) -> tuple[Array, Array]:
    """L and L⁻¹ with L Lᵀ = matrix, L lower triangular; NaN where the matrix is not definite.

    Args:
        matrix_NN: [N, N], symmetric (its lower triangle is read), N a multiple of 16.
    """
    if matrix_NN.shape[0] <= _LARGEST_LEAF:
        leaf = _leaf(matrix_NN)
        return leaf, _inverse(leaf)
    upper = cholesky_with_inverse(_upper_half(matrix_NN))
    below, rest = _lower_half(matrix_NN, upper[1])
    lower = cholesky_with_inverse(rest)
    return _joined(*upper, below, *lower)


def _half(size: int) -> int:
    return size // 2 // _ROWS * _ROWS


@program()
def _upper_half(matrix_NN: Array) -> Array:
    half = _half(matrix_NN.shape[0])
    return matrix_NN[:half, :half]


@program()
def _lower_half(matrix_NN: Array, upper_inverse: Array) -> tuple[Array, Array]:
    """L's rows below its upper half, and what is left to factor under it."""
    half = upper_inverse.shape[0]
    below = product(matrix_NN[half:, :half], upper_inverse.T)
    return below, matrix_NN[half:, half:] - product(below, below.T)


@program()
def _joined(
    upper: Array, upper_inverse: Array, below: Array, lower: Array, lower_inverse: Array
) -> tuple[Array, Array]:
    corner = -product(product(lower_inverse, below), upper_inverse)
    return _stack(upper, below, lower), _stack(upper_inverse, corner, lower_inverse)


@program()
def _stack(upper_left: Array, below: Array, lower_right: Array) -> Array:
    zeros = jnp.zeros((below.shape[1], below.shape[0]), below.dtype)
    top = jnp.concatenate([upper_left, zeros], axis=1)
    return jnp.concatenate([top, jnp.concatenate([below, lower_right], axis=1)])


@program()
def _leaf(matrix_LL: Array) -> Array:
    return lax.linalg.cholesky(matrix_LL, symmetrize_input=False)


@program()
def _inverse(lower_LL: Array) -> Array:
    """The inverse of a leaf's triangle, by forward substitution, some rows at a time."""
    size = lower_LL.shape[0]
    identity_LL = jnp.eye(size)

    def rows(i: Array, inverse_LL: Array) -> Array:
        first = i * _ROWS
        rows_SL = lax.dynamic_slice_in_dim(lower_LL, first, _ROWS)
        corner_SS = lax.dynamic_slice_in_dim(rows_SL, first, _ROWS, axis=1)
        wanted_SL = lax.dynamic_slice_in_dim(identity_LL, first, _ROWS)
        # Rows not yet reached are zero.
        wanted_SL = wanted_SL - product(rows_SL, inverse_LL)

        def row(k: Array, solved_SL: Array) -> Array:
            known_1L = product(lax.dynamic_slice_in_dim(corner_SS, k, 1), solved_SL)
            row_1L = lax.dynamic_slice_in_dim(wanted_SL, k, 1) - known_1L
            solved: Array = lax.dynamic_update_slice_in_dim(
                solved_SL, row_1L / corner_SS[k, k], k, 0
            )
            return solved

        solved_SL = lax.fori_loop(0, _ROWS, row, jnp.zeros_like(wanted_SL))
        inverse: Array = lax.dynamic_update_slice_in_dim(inverse_LL, solved_SL, first, 0)
        return inverse

    inverse_LL: Array = lax.fori_loop(0, size // _ROWS, rows, jnp.zeros_like(lower_LL))
    return inverse_LL
