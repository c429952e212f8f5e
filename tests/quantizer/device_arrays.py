"""Arrays that stand for those of an accelerator: whatever copies one to the host fails."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class OnDevice:
    """What the quantizer may ask of a Gram without a copy; JAX takes it as the array it holds.

    An array of JAX on a CPU would not do, since NumPy reads its memory without asking.
    """

    def __init__(self, array: Any) -> None:
        self._array = jnp.array(array)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._array.shape

    @property
    def nbytes(self) -> int:
        return self._array.nbytes

    def sum(self) -> jax.Array:
        return self._array.sum()

    def max(self) -> jax.Array:
        return self._array.max()

    def min(self) -> jax.Array:
        return self._array.min()

    def diagonal(self) -> jax.Array:
        return self._array.diagonal()

    def __add__(self, other: OnDevice) -> OnDevice:
        return OnDevice(self._array + other._array)

    def __jax_array__(self) -> jax.Array:
        return self._array

    def __array__(self, *args: Any, **options: Any) -> np.ndarray:
        raise AssertionError("a sum on the device is copied to the host")
