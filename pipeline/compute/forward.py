"""A block, cut at the inputs of its layers, so that each layer is calibrated on quantized ones.

The block is traced once with the values of its variables as arguments; blocks of one kind share
what was compiled. While it is traced, the target layers' `call` notes its input: there the
traced program is cut. Stage k computes up to the input of the k-th group of layers; once those
are quantized, stage k + 1 goes on with their new weights. So every layer runs just once, and sees
what it will see in the quantized model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import keras
from jax import Array

from pipeline.compute.traced_program import Stage, cut
from pipeline.errors import SourceError
from pipeline.recipe.recipe import Statistics
from pipeline.source.blocks import Block
from pipeline.source.quantizable import Target
from quantizer import kernel_layout


@dataclass(frozen=True, kw_only=True)
class InputGroup:
    """Target layers that are fed the same tensor: one sum and one factorization serve all.

    Attributes:
        targets: their names within the block, in the order of their calls.
        in_features: C.
        input_axes: the axes of the tensor that are summed with the kernels, from its end.
        statistics: what their schemes need to know of it.
    """

    targets: tuple[str, ...]
    in_features: int
    input_axes: tuple[int, ...]
    statistics: Statistics


class BlockProgram:
    """A block's kind as stages: one to the input of each group, and one to the block's output."""

    def __init__(
        self,
        block: Block,
        statistics: Mapping[str, Statistics | None],
        stream: jax.ShapeDtypeStruct,
        sides: Sequence[jax.ShapeDtypeStruct],
    ) -> None:
        """Trace the block; nothing is computed.

        Args:
            block: any block of the kind.
            statistics: what to know of a target's input, by its name; None or absent for nothing.
            stream, sides: shapes and dtypes of one micro-batch.

        Raises:
            SourceError: a target that the block calls more than once.
        """
        self._block = block
        self._wanted = {
            target.name: target for target in block.targets if statistics.get(target.name)
        }
        self._statistics = statistics
        self.groups: tuple[InputGroup, ...] = ()
        values = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in block.layer.weights]
        traced = jax.make_jaxpr(self._trace)(values, stream, list(sides))
        stages = cut(traced, num_values=len(values))
        self._stages: tuple[Stage, ...] = stages

    def start(self, stream: Any, sides: Sequence[Any]) -> tuple[Any, ...]:
        """What stage 0 begins with."""
        return (stream, *sides)

    def advance(
        self, stage: int, values: Sequence[Any], live: tuple[Any, ...]
    ) -> tuple[Array, tuple[Array, ...]]:
        """Run one stage on one micro-batch.

        Args:
            stage: below `len(groups)`, up to the input of that group; else, to the end.
            values: of the block's weights, in the order of `layer.weights`.
            live: from `start`, or from the stage before.

        Returns:
            the group's input, or the block's output; and what the next stage begins with.
        """
        return self._stages[stage](values, live)

    def _trace(
        self, values: Sequence[Array], stream: Array, sides: Sequence[Array]
    ) -> tuple[Array, ...]:
        """The inputs of the groups, in the order of their first calls, and the output."""
        seen: list[tuple[Target, Array]] = []
        args, kwargs = self._block.bind(stream, sides)
        with _noting(self._wanted.values(), seen):
            output = call_with(self._block.layer, values, *args, **kwargs)
        names = [target.name for target, _ in seen]
        for name in names:
            if names.count(name) > 1:
                raise SourceError(
                    f"{self._block.name}/{name}: called more than once in its block, so it has no "
                    "input of its own; give it a scheme that needs no calibration, or null"
                )
        grouped: list[tuple[list[str], Array, tuple[int, ...], Statistics]] = []
        for target, tensor in seen:
            axes = kernel_layout(target.layer).input_axes
            wanted = self._statistics[target.name]
            assert wanted is not None
            for members, other, *rest in grouped:
                # Layers of one input that need to know other things of it are two groups.
                if other is tensor and rest == [axes, wanted]:
                    members.append(target.name)
                    break
            else:
                grouped.append(([target.name], tensor, axes, wanted))
        self.groups = tuple(
            InputGroup(
                targets=tuple(members),
                in_features=kernel_layout(self._wanted[members[0]].layer).in_features,
                input_axes=axes,
                statistics=wanted,
            )
            for members, _, axes, wanted in grouped
        )
        return (*(tensor for _, tensor, _, _ in grouped), output)


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
