"""What of a model can be quantized: layers that stock Keras loads so, and experts; not others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import keras
from keras import tree

from pipeline.recipe.recipe import LayerKind
from quantizer.keras_format.layers import kernel_layout
from quantizer.keras_format.model_layers import (
    WITH_KERNEL,
    WITH_TABLE,
    obstacle,
    walk,
    watched_calls,
)
from quantizer.problem import KernelAxes


@dataclass(frozen=True, kw_only=True)
class Target:
    """What can be quantized: a layer, or a variable that holds the matrices of experts."""

    path: str
    name: str
    """The path within its block; outside the blocks, the path."""
    layer: keras.layers.Layer
    variable: Any = None
    """Of a bank of experts: the layer's variable [experts, in_features, out_features]. The path is
    then that of the variable."""

    @property
    def num_experts(self) -> int:
        """Matrices of one shape that the variable holds; 0 of a layer that is a matrix itself."""
        return 0 if self.variable is None else int(self.variable.shape[0])

    @property
    def layer_kind(self) -> LayerKind:
        return "embedding" if isinstance(self.layer, WITH_TABLE) else "kernel"

    @property
    def in_features(self) -> int:
        """Inputs of the matrix, or of each expert's; of an embedding, the length of its vectors."""
        if self.variable is not None:
            return int(self.variable.shape[1])
        if self.layer_kind == "embedding":
            return int(self.layer.output_dim)
        return kernel_layout(self.layer).in_features

    @property
    def out_features(self) -> int:
        """Outputs of the matrix, or of each expert's; of an embedding, the number of tokens."""
        if self.variable is not None:
            return int(self.variable.shape[2])
        if self.layer_kind == "embedding":
            return int(self.layer.input_dim)
        return kernel_layout(self.layer).out_features

    @property
    def axes(self) -> KernelAxes:
        """The kernel as one matrix; a bank's rows are the outputs of all experts in turn."""
        if self.variable is not None:
            return KernelAxes(tuple(self.variable.shape), in_axes=(1,), out_axes=(0, 2))
        return kernel_layout(self.layer)

    @property
    def kernel_path(self) -> str:
        """Path of the kernel's variable, unless the layer is an embedding."""
        if self.variable is not None:
            return str(self.variable.path)
        return str(self.layer._kernel.path)

    @property
    def table_path(self) -> str:
        """Path of an embedding's table."""
        return str(self.layer._embeddings.path)

    @property
    def reverse_table_path(self) -> str | None:
        """Path of the second table that an untied ReversibleEmbedding computes logits with."""
        table = getattr(self.layer, "reverse_embeddings", None)
        return None if table is None else str(table.path)


@dataclass(frozen=True, kw_only=True)
class Unsupported:
    """A layer whose matrices have to stay in floating point, and why."""

    path: str
    reason: str
    num_weights: int
    """Of the matrices that it stacks in variables of three axes or more; not of convolutions and
    tables of positions, which no scheme is for."""


def find_targets(
    layers: Iterable[keras.layers.Layer], *, prefix: str = "", embeddings: bool = False
) -> tuple[Target, ...]:
    """The quantizable layers and experts among these and inside them, depth first, each once.

    Args:
        prefix: removed from a path to get the target's name.
        embeddings: whether to include embeddings.
    """
    kinds = WITH_KERNEL + WITH_TABLE if embeddings else WITH_KERNEL
    found: list[Target] = []
    for layer, parents in walk(layers):
        if type(layer) in kinds and obstacle(layer, parents) is None:
            found.append(_target(layer.path, prefix, layer))
        found += [_target(one.path, prefix, layer, one) for one in _banks(layer)]
    return tuple(found)


def find_unsupported(layers: Iterable[keras.layers.Layer]) -> tuple[Unsupported, ...]:
    """The layers with matrices among these and inside them that cannot be quantized."""
    return tuple(
        Unsupported(path=layer.path, reason=reason, num_weights=_stacked_weights(layer))
        for layer, parents in walk(layers)
        if (reason := obstacle(layer, parents)) is not None and not _banks(layer)
    )


def _target(path: str, prefix: str, layer: keras.layers.Layer, variable: Any = None) -> Target:
    name = path.removeprefix(prefix).lstrip("/")
    return Target(path=path, name=name, layer=layer, variable=variable)


def _banks(layer: keras.layers.Layer) -> list[Any]:
    """The variables [experts, in_features, out_features] of a layer that holds many experts.

    Whether a block uses them so is known once it has been traced (see
    `pipeline.worker.expert_products`).
    """
    num_experts = getattr(layer, "num_experts", 0)
    return [one for one in _stacks(layer) if len(one.shape) == 3 and one.shape[0] == num_experts]


def _stacked_weights(layer: keras.layers.Layer) -> int:
    return sum(math.prod(variable.shape) for variable in _stacks(layer))


def _stacks(layer: keras.layers.Layer) -> list[Any]:
    """The variables of three axes or more of a layer that is not Keras' own."""
    if type(layer).__module__.partition(".")[0] == "keras":
        return []
    return [variable for variable in layer._trainable_variables if len(variable.shape) >= 3]


def holds_kernels(layer: keras.layers.Layer) -> bool:
    """Whether there is a Dense or EinsumDense layer inside, however deep."""
    return any(isinstance(inner, WITH_KERNEL) for inner, _ in walk(layer._layers))


def call_with(layer: Any, values: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
    """`layer(*args, **kwargs)` with values for its weights, in the order of `layer.weights`."""
    mapping = list(zip(layer.weights, values, strict=True))
    with keras.StatelessScope(state_mapping=mapping):
        return layer(*args, **kwargs)


def outputs_with(model: keras.Model, values: Sequence[Any], inputs: Any) -> list[Any]:
    """The outputs of a model that has a list of them, as `call_with`."""
    # Keras unpacks a list of one.
    return list(tree.flatten(call_with(model, values, inputs)))


@contextmanager
def recorded_inputs(targets: Iterable[Target]) -> Iterator[list[tuple[Target, Any]]]:
    """Record the first argument of every call of these layers; no call is of experts.

    Yields:
        a list that grows with each call by the target and that tensor.
    """
    inputs: list[tuple[Target, Any]] = []
    by_layer = {id(target.layer): target for target in targets if target.variable is None}

    def record(layer: keras.layers.Layer, tensor: Any) -> None:
        inputs.append((by_layer[id(layer)], tensor))

    with watched_calls([target.layer for target in by_layer.values()], record):
        yield inputs
