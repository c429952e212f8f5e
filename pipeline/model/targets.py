"""The layers that stock Keras can load quantized: why not others, and what reaches them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras

from pipeline.recipe.recipe import LayerKind
from quantizer.errors import LayerError
from quantizer.keras_format.kernel_layout import einsum_layout
from quantizer.keras_format.layers import kernel_layout

_KERNELS = (keras.layers.Dense, keras.layers.EinsumDense)
_TABLES = (keras.layers.Embedding, keras.layers.ReversibleEmbedding)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A layer that can be quantized."""

    path: str
    name: str
    """The path within its block; outside the blocks, the path."""
    layer: keras.layers.Layer

    @property
    def layer_kind(self) -> LayerKind:
        return "embedding" if isinstance(self.layer, _TABLES) else "kernel"

    @property
    def in_features(self) -> int:
        """Inputs of the matrix; of an embedding, the length of its vectors."""
        if self.layer_kind == "embedding":
            return int(self.layer.output_dim)
        return kernel_layout(self.layer).in_features

    @property
    def out_features(self) -> int:
        """Outputs of the matrix; of an embedding, the number of tokens."""
        if self.layer_kind == "embedding":
            return int(self.layer.input_dim)
        return kernel_layout(self.layer).out_features

    @property
    def kernel_path(self) -> str:
        """Path of the kernel's variable, unless the layer is an embedding."""
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


def find_targets(
    layers: Iterable[keras.layers.Layer], *, prefix: str = "", embeddings: bool = False
) -> tuple[Target, ...]:
    """The quantizable layers among these and inside them, depth first, each once.

    Args:
        prefix: removed from a path to get the target's name.
        embeddings: whether to include embeddings.
    """
    kinds = _KERNELS + _TABLES if embeddings else _KERNELS
    return tuple(
        Target(path=layer.path, name=layer.path.removeprefix(prefix).lstrip("/"), layer=layer)
        for layer, parent in _walk(layers)
        # Not subclasses: Keras refuses them, since they may use their weights differently.
        if type(layer) in kinds and _obstacle(layer, parent) is None
    )


def find_unsupported(layers: Iterable[keras.layers.Layer]) -> tuple[Unsupported, ...]:
    """The layers with matrices among these and inside them that cannot be quantized."""
    return tuple(
        Unsupported(path=layer.path, reason=reason)
        for layer, parent in _walk(layers)
        if (reason := _obstacle(layer, parent)) is not None
    )


def holds_kernels(layer: keras.layers.Layer) -> bool:
    """Whether there is a Dense or EinsumDense layer inside, however deep."""
    return any(isinstance(inner, _KERNELS) for inner, _ in _walk(layer._layers))


def _obstacle(layer: keras.layers.Layer, parent: keras.layers.Layer | None) -> str | None:
    if not any(len(variable.shape) >= 2 for variable in layer._trainable_variables):
        return None
    if type(layer) not in _KERNELS + _TABLES:
        return f"stock Keras cannot load a {type(layer).__name__} quantized"
    if type(layer) is keras.layers.EinsumDense and layer.quantization_mode is None:
        try:
            einsum_layout(layer.equation, tuple(layer._kernel.shape))
        except LayerError as error:
            return str(error)
    if type(layer) is keras.layers.Dense and layer.units == getattr(parent, "num_experts", None):
        return "it routes tokens to experts, and rounding would change the choice"
    return None


def _walk(
    layers: Iterable[keras.layers.Layer],
) -> Iterator[tuple[keras.layers.Layer, keras.layers.Layer | None]]:
    """Every layer with its parent, in order of creation; shared layers once."""
    seen: set[int] = set()
    pending: list[tuple[Any, Any]] = [(layer, None) for layer in reversed(list(layers))]
    while pending:
        layer, parent = pending.pop()
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        yield layer, parent
        pending.extend((inner, layer) for inner in reversed(layer._layers))


def call_with(layer: Any, values: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
    """`layer(*args, **kwargs)` with values for its weights, in the order of `layer.weights`."""
    mapping = list(zip(layer.weights, values, strict=True))
    with keras.StatelessScope(state_mapping=mapping):
        return layer(*args, **kwargs)


@contextmanager
def recorded_inputs(targets: Iterable[Target]) -> Iterator[list[tuple[Target, Any]]]:
    """Record the first argument of every call of these layers.

    Yields:
        a list that grows with each call by the target and that tensor.
    """
    inputs: list[tuple[Target, Any]] = []

    def record(target: Target, call: Callable[..., Any], tensor: Any, **kwargs: Any) -> Any:
        inputs.append((target, tensor))
        return call(tensor, **kwargs)

    watched = list(targets)
    for target in watched:
        # Set on the instance, past Keras' tracking of attributes, and removed again below.
        object.__setattr__(target.layer, "call", partial(record, target, target.layer.call))
    try:
        yield inputs
    finally:
        for target in watched:
            object.__delattr__(target.layer, "call")
