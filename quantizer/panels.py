"""What the columns of a panel read, and the products that go from panel to panel."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from quantizer.cholesky import product
from quantizer.program import program


def rows_of(rows: Array, first: Array | int, size: int) -> Array:
    """`size` rows from `first` on."""
    part: Array = lax.dynamic_slice_in_dim(rows, first, size)
    return part


panel_part = program(static_argnames="size")(rows_of)


class Columns(NamedTuple):
    """What the columns of one panel read.

    Attributes:
        weight_PR: live weights, [panel, slice].
        group_P: the group of each.
        scale_GR, zero_GR: the slice's grid, [groups, slice].
    """

    weight_PR: Array
    group_P: Array
    scale_GR: Array
    zero_GR: Array

    def grid_at(self, column: Array) -> tuple[Array, Array]:
        """Scales and zero points of a column, [slice] each."""
        group = self.group_P[column]
        return self.scale_GR[group], self.zero_GR[group]

    def part(self, first: Array, size: int) -> Columns:
        """`size` columns of the panel."""
        weight_BR = rows_of(self.weight_PR, first, size)
        group_B = rows_of(self.group_P, first, size)
        return Columns(weight_BR, group_B, self.scale_GR, self.zero_GR)

    def grid(self) -> tuple[Array, Array]:
        """Scales and zero points of all columns, [panel, slice] each."""
        return jnp.take(self.scale_GR, self.group_P, 0), jnp.take(self.zero_GR, self.group_P, 0)


@program(static_argnames="size")
def columns_of(
    weight_CR: Array,
    group_C: Array,
    live_C: Array,
    order_C: Array,
    first: int,
    *,
    size: int,
) -> tuple[Array, Array]:
    """Live weights and groups of the panel of `size` columns from step `first` on."""
    # A padded input is a dead one.
    source_P = lax.dynamic_slice_in_dim(order_C, first, size)
    live_P = jnp.take(live_C, source_P, mode="fill", fill_value=False)
    weight_PR = jnp.take(weight_CR, source_P, axis=0, mode="clip")
    return jnp.where(live_P[:, None], weight_PR, 0.0), jnp.take(group_C, source_P, mode="clip")


@program(static_argnums=0)
def nothing(shape: tuple[int, ...]) -> Array:
    """Zeros, float32; outside a program, JAX needs half a millisecond for them."""
    return jnp.zeros(shape)


@program()
def add_product(block_BA: Array, errors_A: Array, pull: Array) -> Array:
    """The corrections `pull`, [B, ...], with those that finished columns' errors ask for."""
    return pull + pull_of(block_BA, errors_A)


def pull_of(block_BA: Array, errors_A: Array) -> Array:
    """The corrections that finished columns' errors ask for, [B, ...]."""
    flat: Array = product(block_BA, errors_A.reshape(errors_A.shape[0], -1))
    return flat.reshape(-1, *errors_A.shape[1:])
