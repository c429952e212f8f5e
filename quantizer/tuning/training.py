"""Gradient descent on a block's steps: its error, the error's gradient, and Adam (arXiv 1412.6980).

The error is that of the block's output, relative by token: Σ‖y − t‖² / ‖t‖² over tokens, with t
what the float model's block gives for float inputs, and y what the quantized one gives for the
inputs that it will have. Norms, which come next in nearly all models, make it what matters: a few
tokens' hidden states are a thousand times as long as the others'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from quantizer.tuning.rounding import Grid, Steps, bounded, codes, scales, stored, weights

Forward: TypeAlias = Callable[[Sequence[Array], Sequence[Array]], Sequence[Array]]
"""(a block's weights, what its call takes) → what it gives."""

_DECAYS = (0.9, 0.999)
_SMALLEST = 1e-15
"""Beside the root of squared gradients; errors are of a whole block, so that these are small."""
_LEAST_TOKEN = 1e-3
"""Of the mean of tokens' squares: what is smaller counts as this much."""


@dataclass(frozen=True, kw_only=True)
class KernelForm:
    """A kernel that is trained.

    Attributes:
        place: among the block's weights.
        shape, dtype: as the block takes it; the grid is of its transpose.
        group_size: rows of the grid that share a scale; -1 for all.
        scale_dtype: in which its scales are stored.
    """

    place: int
    shape: tuple[int, ...]
    dtype: str
    weight_bits: int
    group_size: int
    scale_dtype: str


@dataclass(frozen=True, kw_only=True)
class VectorForm:
    """A norm's weight that is trained.

    Attributes:
        place: among the block's weights.
        dtype: in which the block takes it; stored_dtype: in which it is stored.
    """

    place: int
    dtype: str
    stored_dtype: str


class Start(NamedTuple):
    """Where training starts: grids in the order of the kernels' forms, and vectors in theirs."""

    grids: tuple[Grid, ...]
    vectors: tuple[Any, ...]


class Trained(NamedTuple):
    """What is trained: the steps of kernels, and how vectors change, in units of their elements."""

    kernels: tuple[Steps, ...]
    vectors: tuple[Any, ...]


class Batch(NamedTuple):
    """A micro-batch.

    Attributes:
        taken: what the block's call takes.
        targets: what the float model's block gives.
        masks: of each target, where its vectors are of the windows' content: [batch, positions]
            for most.
    """

    taken: tuple[Any, ...]
    targets: tuple[Any, ...]
    masks: tuple[Any, ...]


class Moments(NamedTuple):
    """Adam's running means of gradients and of their squares."""

    mean: Trained
    square: Trained


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Learning rates of the first step; they fall to 0 in a straight line.

    Attributes:
        offset: in steps of the grid; scale: of the logarithm; norm: relative.
    """

    offset: float
    scale: float
    norm: float


class BlockTraining:
    """Compiled programs to train the blocks of one signature."""

    def __init__(
        self,
        forward: Forward,
        kernels: Sequence[KernelForm],
        vectors: Sequence[VectorForm],
    ) -> None:
        self._forward = forward
        self._kernels = tuple(kernels)
        self._vectors = tuple(vectors)
        self._gradient = jax.jit(self._add_gradient, donate_argnums=(0,))
        self._error = jax.jit(self._error_of)
        self._update = jax.jit(self._updated, donate_argnums=(0, 1))

    def train(
        self,
        first: Trained,
        start: Start,
        values: Sequence[Any],
        steps: Sequence[Sequence[Batch]],
        rates: Rates,
    ) -> Trained:
        """Train for some steps.

        Args:
            values: the block's weights, in order; those that are trained are not read.
            steps: the micro-batches of each, whose gradients are added in order.
        """
        trained: Trained = jax.tree.map(jnp.array, first)
        start = jax.device_put(start)  # once, and not for every micro-batch
        zeros: Callable[[], Trained] = partial(jax.tree.map, jnp.zeros_like, trained)
        moments = Moments(zeros(), zeros())
        for number, batches in enumerate(steps):
            gradient = zeros()
            for batch in batches:
                gradient = self._gradient(gradient, trained, start, values, batch)
            now = _by_leaf(trained, rates, left=1 - number / len(steps))
            trained, moments = self._update(trained, moments, start.grids, gradient, now, number)
        return trained

    def error(
        self, trained: Trained, start: Start, values: Sequence[Any], batches: Sequence[Batch]
    ) -> float:
        """The mean relative error over the tokens of all micro-batches."""
        trained, start = jax.device_put((trained, start))
        found = [self._error(trained, start, values, batch) for batch in batches]
        total = sum(float(error) for error, _ in found)
        return total / sum(int(count) for _, count in found)

    def block_weights(self, trained: Trained, start: Start, values: Sequence[Any]) -> list[Any]:
        """The block's weights with what is trained in place, in the dtypes that it takes."""
        found = list(values)
        for form, grid, steps in zip(self._kernels, start.grids, trained.kernels, strict=True):
            matrix_RC = weights(grid, steps, form.weight_bits, form.group_size, form.scale_dtype)
            found[form.place] = matrix_RC.T.reshape(form.shape).astype(form.dtype)
        for vector, value, step in zip(self._vectors, start.vectors, trained.vectors, strict=True):
            found[vector.place] = moved(value, step, vector.stored_dtype).astype(vector.dtype)
        return found

    def results(
        self, trained: Trained, start: Start
    ) -> tuple[list[tuple[NDArray[np.uint8], NDArray[np.float32]]], list[NDArray[np.float32]]]:
        """Codes and scales of each kernel, and each vector, as they are to be stored."""
        kernels = [
            (
                np.asarray(codes(grid, steps, form.weight_bits)).astype(np.uint8),
                np.asarray(scales(grid, steps, form.scale_dtype)),
            )
            for form, grid, steps in zip(self._kernels, start.grids, trained.kernels, strict=True)
        ]
        vectors = [
            np.asarray(moved(value, step, form.stored_dtype))
            for form, value, step in zip(self._vectors, start.vectors, trained.vectors, strict=True)
        ]
        return kernels, vectors

    def _error_of(
        self, trained: Trained, start: Start, values: Sequence[Any], batch: Batch
    ) -> tuple[Array, Array]:
        """The sum of tokens' errors, and their number."""
        given = self._forward(self.block_weights(trained, start, values), batch.taken)
        pairs = zip(given, batch.targets, batch.masks, strict=True)
        sums = [token_errors(y, t, mask) for y, t, mask in pairs]
        counts = [jnp.sum(mask) for mask in batch.masks]
        return jnp.sum(jnp.stack(sums)), jnp.sum(jnp.stack(counts))

    def _add_gradient(
        self, total: Trained, trained: Trained, start: Start, values: Sequence[Any], batch: Batch
    ) -> Trained:
        def error(at: Trained) -> Array:
            return self._error_of(at, start, values, batch)[0]

        added: Trained = jax.tree.map(jnp.add, total, jax.grad(error)(trained))
        return added

    def _updated(
        self,
        trained: Trained,
        moments: Moments,
        grids: Sequence[Grid],
        gradient: Trained,
        rates: Trained,
        number: Array,
    ) -> tuple[Trained, Moments]:
        """One step of Adam, the `number`-th from 0."""
        first, second = _DECAYS
        mean = jax.tree.map(lambda m, g: first * m + (1 - first) * g, moments.mean, gradient)
        square = jax.tree.map(
            lambda s, g: second * s + (1 - second) * jnp.square(g), moments.square, gradient
        )
        passed = jnp.asarray(number, jnp.float32) + 1

        def step(value: Array, m: Array, s: Array, rate: Array) -> Array:
            m, s = m / (1 - first**passed), s / (1 - second**passed)
            return value - rate * m / (jnp.sqrt(s) + _SMALLEST)

        kernels, vectors = jax.tree.map(step, trained, mean, square, rates)
        within = [
            bounded(grid, steps, form.weight_bits)
            for form, grid, steps in zip(self._kernels, grids, kernels, strict=True)
        ]
        return Trained(tuple(within), vectors), Moments(mean, square)


def token_errors(given: Array, target: Array, mask: Array) -> Array:
    """Σ‖y − t‖² / ‖t‖² over the vectors of a mask, float32.

    Args:
        given, target: [..., features]; mask: [...].
    """
    target = target.astype(jnp.float32)
    # Not a product with the mask, since padding may hold infinity.
    off = jnp.where(mask[..., None], given.astype(jnp.float32) - target, 0.0)
    size = jnp.sum(jnp.square(jnp.where(mask[..., None], target, 0.0)), axis=-1)
    mean = jnp.sum(size) / jnp.maximum(jnp.sum(mask), 1)
    least = jnp.maximum(_LEAST_TOKEN * mean, jnp.finfo(jnp.float32).tiny)
    return jnp.sum(jnp.sum(jnp.square(off), axis=-1) / jnp.maximum(size, least))


def moved(vector: Any, step: Any, stored_dtype: str) -> Array:
    """A norm's weight after a step in units of its elements, rounded as it is stored.

    An element's unit is its size, but no less than the median's: weights near 0 move too.
    """
    size = jnp.abs(jnp.asarray(vector, jnp.float32))
    unit = jnp.maximum(size, jnp.median(size))
    return stored(jnp.asarray(vector, jnp.float32) + unit * step, stored_dtype)


def _by_leaf(trained: Trained, rates: Rates, left: float) -> Trained:
    """What is left of the rates, for each array that is trained."""
    return Trained(
        tuple(Steps(rates.offset * left, rates.scale * left) for _ in trained.kernels),
        tuple(rates.norm * left for _ in trained.vectors),
    )
