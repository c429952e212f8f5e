"""Which layers of a model stock Keras can hold quantized, and which not, and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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
    """A layer that can be quantized.

    Attributes:
        path: the Keras layer's path, by which a `DTypePolicyMap` names it.
        name: the path within its block; outside the blocks, the path.
        layer: the Keras layer.
    """

    path: str
    name: str
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
        """Path of the kernel's variable; the layer must not be an embedding."""
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
    """A layer with matrices that stay in floating point, and why."""

    path: str
    reason: str


def find_targets(
    layers: Iterable[keras.layers.Layer], *, prefix: str = "", embeddings: bool = False
) -> tuple[Target, ...]:
    """The quantizable layers among these and all inside them, depth first, each once.

    Args:
        layers: where to look.
        prefix: what to cut from a path to get the name.
        embeddings: whether to take embeddings too.
    """
    kinds = _KERNELS + _TABLES if embeddings else _KERNELS
    return tuple(
        Target(path=layer.path, name=layer.path.removeprefix(prefix).lstrip("/"), layer=layer)
        for layer, parent in _walk(layers)
        # Keras refuses subclasses: they may use their weights in ways of their own.
        if type(layer) in kinds and _obstacle(layer, parent) is None
    )


def find_unsupported(layers: Iterable[keras.layers.Layer]) -> tuple[Unsupported, ...]:
    """What holds matrices among these and all inside them, and cannot be quantized."""
    found = []
    for layer, parent in _walk(layers):
        reason = _obstacle(layer, parent)
        if reason is not None:
            found.append(Unsupported(path=layer.path, reason=reason))
    return tuple(found)


def holds_kernels(layer: keras.layers.Layer) -> bool:
    """Whether there is a Dense or EinsumDense layer somewhere inside."""
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
    if _routes(layer, parent):
        return "it routes tokens to experts, where rounding would change the choice"
    return None


def _routes(layer: keras.layers.Layer, parent: keras.layers.Layer | None) -> bool:
    num_experts = getattr(parent, "num_experts", None)
    return type(layer) is keras.layers.Dense and layer.units == num_experts


def _walk(
    layers: Iterable[keras.layers.Layer],
) -> Iterator[tuple[keras.layers.Layer, keras.layers.Layer | None]]:
    """Every layer with its parent, in the order in which they were made; shared ones once."""
    seen: set[int] = set()
    pending: list[tuple[Any, Any]] = [(layer, None) for layer in reversed(list(layers))]
    while pending:
        layer, parent = pending.pop()
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        yield layer, parent
        pending.extend((inner, layer) for inner in reversed(layer._layers))
