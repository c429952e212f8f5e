"""The Hessian's factor, which turns rounding errors into the corrections of later columns.

GPTQ (arXiv 2210.17323, Alg. 1) reads its corrections from the Cholesky factor of H⁻¹. With
H = A D Aᵀ, A unit upper triangular and D diagonal, the same corrections are

    w̃_k = w_k + Σ_{i<k} (w_i - ŵ_i) A_ik

(arXiv 2307.13304, Theorem 6: GPTQ is LDLQ). So H is factored once, from its last column up,
and nothing is inverted: ⅓C³ flops instead of ⅔C³. The loss follows at no cost:
tr(Δ H Δᵀ) = Σ_k D_k ‖w̃_k - ŵ_k‖².

The factor is blocked by panels; `cholesky` factors one panel's corner. From about 256 columns on
LAPACK's threaded kernels become a hundred times slower when another process holds a core, so it is
called on leaves of at most 160, which it factors on one thread; all else is matrix products. Each
step is a separate program, so that one serves all panels, and one all leaves, of a size. On a GPU
one call factors the whole (`factorize_whole`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpy.typing import NDArray

from quantizer.jit import product, program

PANEL = 512
"""Columns whose corrections are brought up to date by one matrix product (see `panel_bounds`)."""
TILE = 16
"""Columns solved one by one inside a block."""
# More tiles in a block mean more products with zeros, fewer mean more calls.
_BLOCK_TILES = 9

SMALLEST_PIVOT = 1e-6
"""Below this share of the mean diagonal a pivot is rounding noise, not curvature."""
_FIRST_RAISE = 1e-4
_RAISE = 10.0
_LARGEST_DAMPING = 1.0


def block_size(panel: int) -> int:
    """Columns of so large a panel whose corrections come from it by one matrix product.

    Blocks are as even as possible and at most 144; padding a panel to whole blocks keeps them.
    """
    tiles = -(-panel // TILE)
    blocks = -(-tiles // _BLOCK_TILES)
    return -(-tiles // blocks) * TILE


def panel_bounds(size: int) -> list[tuple[int, int]]:
    """The panels [a, b) of so many columns, the last one padded to whole blocks.

    All begin at a multiple of PANEL. A remainder joins the last panel unless it exceeds half a
    panel: a short panel costs as many calls as a full one. The padded size has the same panels,
    so the factor and the refinement agree on them.
    """
    count = max(1, (size + PANEL // 2 - 1) // PANEL)
    start = (count - 1) * PANEL
    block = block_size(size - start)
    end = start + -(-(size - start) // block) * block
    return [(a, a + PANEL) for a in range(0, start, PANEL)] + [(start, end)]


Blocks: TypeAlias = tuple[tuple[Array, ...], ...]
"""Rows of a matrix's blocks."""


@dataclass(frozen=True)
class Factor:
    """H + damping, in solving order, as A D Aᵀ; shared by all layers of one input.

    Attributes:
        panels: for each panel of columns [a:b), its blocks of Aᵀ, [b - a, panel's width], one for
            each panel up to itself: transposed, since XLA multiplies those a third faster. On a
            GPU all columns are one panel.
        pivot_C: D, [C'], with C' the padded in_features; 0 at dead inputs, where errors cost
            nothing.
        order_C: the input solved at each step, [C']; entries from in_features on are padding.
        dead_C: inputs that were zero in every calibration row, [in_features].
        shift: what was added to the diagonal, a float32 scalar.
        damping: the same as a share of the mean diagonal; the scheme's, or more if that failed.
    """

    panels: Blocks
    pivot_C: Array
    order_C: Array
    dead_C: NDArray[np.bool_]
    shift: Array
    damping: float

    def on_device(self, device: jax.Device) -> Factor:
        """A copy on another device."""
        arrays = self.panels, self.pivot_C, self.order_C, self.shift
        panels, pivot_C, order_C, shift = jax.device_put(arrays, device)
        return Factor(panels, pivot_C, order_C, self.dead_C, shift, self.damping)


def dampings(hessian_damping: float) -> list[float]:
    """The shares of the mean diagonal to try, rising."""
    tries = [hessian_damping]
    while tries[-1] < _LARGEST_DAMPING:
        tries.append(min(max(tries[-1] * _RAISE, _FIRST_RAISE), _LARGEST_DAMPING))
    return tries


@program(static_argnames="activation_order")
def arrange(gram_CC: Array, num_rows: Array, activation_order: bool) -> tuple[Array, ...]:
    """The Hessian in solving order, padded; that order; dead inputs; the mean diagonal."""
    energy_C = 2.0 / num_rows * jnp.diagonal(gram_CC)
    dead_C = energy_C == 0
    mean = jnp.sum(energy_C) / jnp.maximum(jnp.sum(~dead_C), 1)
    count = energy_C.shape[0]
    padding = panel_bounds(count)[-1][1] - count
    if activation_order:
        order_C = jnp.argsort(-energy_C, stable=True)
        gram_CC = jnp.take(jnp.take(gram_CC, order_C, axis=0), order_C, axis=1)
    else:
        order_C = jnp.arange(count)
    hessian_CC = jnp.pad(gram_CC * (2.0 / num_rows), ((0, padding), (0, padding)))
    # Dead and padded inputs are alone in their rows: any positive diagonal leaves them uncoupled.
    alone_C = jnp.pad(dead_C[order_C], (0, padding), constant_values=True)
    hessian_CC = hessian_CC + jnp.diag(jnp.where(alone_C, mean, 0.0))
    order_C = jnp.concatenate([order_C, jnp.arange(count, count + padding)])
    return hessian_CC, order_C, dead_C, mean


def factorize_shifted(hessian_CC: Array, shift: Array) -> tuple[Blocks, Array]:
    """Blocked H + shift·I = A D Aᵀ, last panel first; a failure shows as NaN pivots.

    What is compiled does not grow with the layer's size.
    """
    size = hessian_CC.shape[0]
    bounds = panel_bounds(size)
    rows: dict[int, list[Array]] = {}
    for j in reversed(range(len(bounds))):
        a, b = bounds[j]
        row = [_block(hessian_CC, a, c, b - a, d - c) for c, d in bounds[: j + 1]]
        for later in rows.values():
            row = [
                _less_product(block, later[j], right)
                for block, right in zip(row, later, strict=False)
            ]
        corner = _turned(row[j], shift)
        if j == 0:
            rows[j] = [_turned_back(cholesky(corner))]
        else:
            lower, inverse = cholesky_with_inverse(corner)
            rows[j] = [*(_solved(inverse, block) for block in row[:j]), _turned_back(lower)]
    scales = [_diagonal(rows[j][j]) for j in range(len(bounds))]
    # One panel at a time, so that its unscaled blocks are freed before the next.
    panels = tuple(
        tuple(_per_row(block, scale) for block in rows.pop(j)) for j, scale in enumerate(scales)
    )
    return panels, _squared(*scales)


@program()
def factorize_whole(hessian_CC: Array, shift: Array) -> tuple[Blocks, Array]:
    """H + shift·I = A D Aᵀ as one panel, by one call of a library: how GPUs do it best.

    With J the matrix that reverses an order, J H J = L Lᵀ is an ordinary Cholesky factorization,
    and H = (J L J) (J L J)ᵀ, of which J L J is upper triangular: A, once its diagonal is one.
    """
    lower_CC = lax.linalg.cholesky(_reversed(hessian_CC, shift), symmetrize_input=False)
    scale_C = jnp.diagonal(lower_CC)[::-1]
    return ((lower_CC[::-1, ::-1].T / scale_C[:, None],),), scale_C**2


@program(static_argnums=(3, 4))
def _block(hessian_CC: Array, a: int, c: int, height: int, width: int) -> Array:
    return lax.dynamic_slice(hessian_CC, (a, c), (height, width))


@program()
def _less_product(block: Array, later: Array, right: Array) -> Array:
    return block - product(later.T, right)


def _reversed(corner: Array, shift: Array) -> Array:
    """Factoring from the last row up is an ordinary Cholesky of the reversed matrix."""
    return (corner + shift * jnp.eye(corner.shape[0]))[::-1, ::-1]


_turned = program()(_reversed)


@program()
def _turned_back(lower: Array) -> Array:
    return lower[::-1, ::-1].T


@program()
def _solved(inverse: Array, block: Array) -> Array:
    return product(inverse[::-1, ::-1], block)


_diagonal = program()(jnp.diagonal)


@program()
def _per_row(block: Array, scale: Array) -> Array:
    return block / scale[:, None]


@program()
def _squared(*scales: Array) -> Array:
    return jnp.concatenate(scales) ** 2


def factorize(
    gram_CC: Array,
    num_rows: int,
    *,
    hessian_damping: float,
    activation_order: bool,
    shifted: Callable[[Array, Array], tuple[Blocks, Array]] = factorize_shifted,
) -> Factor | None:
    """Factor the Hessian 2·gram/num_rows, raising the damping until it can be.

    Args:
        shifted: factors it for one damping: `factorize_shifted` or `factorize_whole`.

    Returns:
        The factor, or None when even a damping of 1 left it indefinite (gram_CC is then no
        sum of xᵀx): the caller rounds to nearest and reports it.
    """
    hessian_CC, order_C, dead_C, mean = arrange(gram_CC, jnp.float32(num_rows), activation_order)
    del gram_CC  # as large as each copy that follows; the caller keeps no reference either
    for damping in dampings(hessian_damping):
        shift = jnp.float32(damping * float(mean))
        panels, pivot_C = shifted(hessian_CC, shift)
        smallest = float(jnp.min(pivot_C))  # NaN fails the comparison below, too
        if smallest >= SMALLEST_PIVOT * float(mean):
            dead = np.asarray(dead_C)
            pivot_C = _without(dead, order_C, pivot_C)
            return Factor(panels, pivot_C, order_C, dead, shift, damping)
    return None


def _without(dead_C: NDArray[np.bool_], order_C: Array, pivot_C: Array) -> Array:
    """The pivots, with 0 at dead inputs."""
    if not dead_C.any():
        return pivot_C
    known_C = np.array(pivot_C)
    known_C[: len(dead_C)][dead_C[np.asarray(order_C)[: len(dead_C)]]] = 0
    return jnp.asarray(known_C)


_LARGEST_LEAF = 160
_ROWS = 16


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
