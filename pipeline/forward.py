"""One compiled program per kind of block: run it, or see what its layers are fed.

A Keras layer is traced once with the values of its variables as arguments, so blocks of one kind
share a program. While capture is traced, the target layers' `call` also notes its input: the
traced function then returns Σxᵀx (or magnitudes) of every distinct input, in one fused program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax import Array, lax

from pipeline.blocks import Block
from pipeline.quantizable import Target
from pipeline.recipe import Statistics
from quantizer import HessianSum, MagnitudeSum, kernel_layout
from quantizer.kernels import KernelLayout

# A Gram is symmetric: of so many column blocks only those on and right of the diagonal are
# multiplied, 10/16 of the flops.
_GRAM_BLOCKS = 4
_SMALLEST_GRAM_BLOCK = 128

Sums = HessianSum | MagnitudeSum
_Carry = tuple[Array, ...]


@dataclass(frozen=True, kw_only=True)
class InputGroup:
    """Target layers that are fed the same tensor: one sum and one factorization serve all.

    Attributes:
        targets: their names within the block, in the order of their calls.
        in_features: C.
        statistics: what their schemes need to know of it.
    """

    targets: tuple[str, ...]
    in_features: int
    statistics: Statistics


class BlockProgram:
    """A block's kind, compiled: `run` it, or `capture` the inputs of its targets."""

    def __init__(
        self,
        block: Block,
        statistics: Mapping[str, Statistics | None],
        stream: jax.ShapeDtypeStruct,
        sides: Sequence[jax.ShapeDtypeStruct],
    ) -> None:
        """Trace the block abstractly, to learn which of its targets share an input.

        Args:
            block: any block of the kind.
            statistics: what to capture, by a target's name; None or absent for nothing.
            stream, sides: shapes and dtypes of one micro-batch.
        """
        self._block = block
        self._wanted = {
            target.name: target for target in block.targets if statistics.get(target.name)
        }
        self._statistics = statistics
        self.groups: tuple[InputGroup, ...] = ()
        if self._wanted:
            values = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in block.layer.weights]
            jax.eval_shape(self._learn, values, stream, list(sides))
        self._run: Callable[..., Array] = jax.jit(self._output)
        self._capture: Callable[..., list[_Carry]] = jax.jit(self._sums, donate_argnums=(4,))

    def run(self, values: Sequence[Any], stream: Any, sides: Sequence[Any]) -> Array:
        """The block's output, [batch, sequence, hidden].

        Args:
            values: of the block's weights, in the order of `layer.weights`.
        """
        return self._run(values, stream, list(sides))

    def capture(
        self,
        values: Sequence[Any],
        stream: Any,
        sides: Sequence[Any],
        mask: Any,
        carry: list[_Carry],
    ) -> list[_Carry]:
        """Add one micro-batch to the sums.

        Args:
            mask: [batch, sequence], bool; rows where it is false are left out.
            carry: the sums so far (see `empty`); it is used up.
        """
        return self._capture(values, stream, list(sides), mask, carry)

    def empty(self) -> list[_Carry]:
        """Sums of nothing, one for each group."""
        return [_EMPTY[group.statistics](group.in_features) for group in self.groups]

    def finish(self, carry: Sequence[_Carry]) -> list[Sums]:
        """Sums as the solvers take them, one for each group."""
        return [
            _FINISH[group.statistics](*(np.asarray(array) for array in arrays))
            for group, arrays in zip(self.groups, carry, strict=True)
        ]

    def _learn(self, values: Sequence[Array], stream: Array, sides: Sequence[Array]) -> Array:
        inputs, output = self._trace(values, stream, sides)
        self.groups = tuple(
            InputGroup(
                targets=names,
                in_features=kernel_layout(self._wanted[names[0]].layer).in_features,
                statistics=statistics,
            )
            for names, _, statistics in inputs
        )
        return output

    def _output(self, values: Sequence[Array], stream: Array, sides: Sequence[Array]) -> Array:
        args, kwargs = self._block.bind(stream, sides)
        output: Array = call_with(self._block.layer, values, *args, **kwargs)
        return output

    def _sums(
        self,
        values: Sequence[Array],
        stream: Array,
        sides: Sequence[Array],
        mask: Array,
        carry: list[_Carry],
    ) -> list[_Carry]:
        inputs, _ = self._trace(values, stream, sides)
        added = []
        for (names, tensor, statistics), sums in zip(inputs, carry, strict=True):
            layout = kernel_layout(self._wanted[names[0]].layer)
            added.append(_ADD[statistics](sums, _rows(tensor, layout), mask))
        return added

    def _trace(
        self, values: Sequence[Array], stream: Array, sides: Sequence[Array]
    ) -> tuple[list[tuple[tuple[str, ...], Array, Statistics]], Array]:
        """Distinct inputs: names of the targets fed it, the tensor, what to know; and the output.

        Layers of one input that need other statistics of it are two groups.
        """
        seen: list[tuple[Target, Array]] = []
        with _noting(self._wanted.values(), seen):
            output = self._output(values, stream, sides)
        grouped: list[tuple[list[str], Array, tuple[int, ...], Statistics]] = []
        for target, tensor in seen:
            axes = kernel_layout(target.layer).input_axes
            wanted = self._statistics[target.name]
            assert wanted is not None
            for names, other, *rest in grouped:
                if other is tensor and rest == [axes, wanted]:
                    names.append(target.name)
                    break
            else:
                grouped.append(([target.name], tensor, axes, wanted))
        return [(tuple(names), tensor, wanted) for names, tensor, _, wanted in grouped], output


def call_with(layer: Any, values: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
    """`layer(*args, **kwargs)` with values for its weights, in the order of `layer.weights`."""
    mapping = list(zip(layer.weights, values, strict=True))
    with keras.StatelessScope(state_mapping=mapping):
        return layer(*args, **kwargs)


@contextmanager
def _noting(targets: Any, seen: list[tuple[Target, Array]]) -> Iterator[None]:
    def noting(target: Target, call: Callable[..., Any], inputs: Any, **kwargs: Any) -> Any:
        seen.append((target, inputs))
        return call(inputs, **kwargs)

    watched = list(targets)
    for target in watched:
        # On the instance, for the time of one trace, and past Keras' tracking of attributes.
        object.__setattr__(target.layer, "call", partial(noting, target, target.layer.call))
    try:
        yield
    finally:
        for target in watched:
            object.__delattr__(target.layer, "call")


def _rows(tensor: Array, layout: KernelLayout) -> Array:
    """A layer's input as float32 [batch, sequence, in_features]."""
    last = tuple(range(-len(layout.input_axes), 0))
    moved = jnp.moveaxis(tensor, layout.input_axes, last)
    return moved.reshape(*moved.shape[: -len(last)], -1).astype(jnp.float32)


def _masked(rows: Array, mask: Array) -> Array:
    # Chosen, not multiplied: padding may hold infinity.
    return jnp.where(mask[..., None], rows, 0.0).reshape(-1, rows.shape[-1])


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


def _add_hessian(sums: _Carry, rows: Array, mask: Array) -> _Carry:
    gram_CC, num_rows = sums
    return gram_CC + gram(_masked(rows, mask)), num_rows + jnp.sum(mask, dtype=jnp.int32)


def _add_magnitudes(sums: _Carry, rows: Array, mask: Array) -> _Carry:
    total, square, largest, num_rows = sums
    size_NC = jnp.abs(_masked(rows, mask))
    return (
        total + jnp.sum(size_NC, axis=0),
        square + jnp.sum(jnp.square(size_NC), axis=0),
        jnp.maximum(largest, jnp.max(size_NC, axis=0)),
        num_rows + jnp.sum(mask, dtype=jnp.int32),
    )


def _empty_hessian(size: int) -> _Carry:
    return jnp.zeros((size, size)), jnp.int32(0)


def _empty_magnitudes(size: int) -> _Carry:
    return jnp.zeros(size), jnp.zeros(size), jnp.zeros(size), jnp.int32(0)


_ADD = {"hessian": _add_hessian, "magnitudes": _add_magnitudes}
_EMPTY = {"hessian": _empty_hessian, "magnitudes": _empty_magnitudes}
_FINISH: Mapping[str, Callable[..., Sums]] = {
    "hessian": lambda gram_CC, num_rows: HessianSum(gram_CC, int(num_rows)),
    "magnitudes": lambda total, square, largest, num_rows: MagnitudeSum(
        total, square, largest, int(num_rows)
    ),
}
