"""The layers of a model: which hold matrices, why some have to stay in float, and their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import keras

from quantizer.errors import LayerError
from quantizer.keras_format.kernel_layout import einsum_layout

WITH_KERNEL = (keras.layers.Dense, keras.layers.EinsumDense)
WITH_TABLE = (keras.layers.Embedding, keras.layers.ReversibleEmbedding)


def walk(
    layers: Iterable[keras.layers.Layer],
) -> Iterator[tuple[keras.layers.Layer, tuple[keras.layers.Layer, ...]]]:
    """Every layer with those that contain it, outermost first; in order of creation, each once."""
    seen: set[int] = set()
    pending: list[tuple[Any, tuple[Any, ...]]] = [(layer, ()) for layer in reversed(list(layers))]
    while pending:
        layer, parents = pending.pop()
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        yield layer, parents
        pending.extend((inner, (*parents, layer)) for inner in reversed(layer._layers))


def layer_name(layer: keras.layers.Layer) -> str:
    """A layer's path; its name if it was never built, and so has no path."""
    return str(layer.path or layer.name)


def obstacle(layer: keras.layers.Layer, parents: tuple[keras.layers.Layer, ...]) -> str | None:
    """Why the layer's matrices have to stay in float; None if they need not, or it has none.

    Args:
        parents: as `walk` gives them.
    """
    if not any(len(variable.shape) >= 2 for variable in layer._trainable_variables):
        return None
    # Not subclasses: Keras refuses them, since they may use their weights differently.
    if type(layer) not in WITH_KERNEL + WITH_TABLE:
        return f"stock Keras cannot load a {type(layer).__name__} quantized"
    if type(layer) is keras.layers.EinsumDense and layer.quantization_mode is None:
        try:
            einsum_layout(layer.equation, tuple(layer._kernel.shape))
        except LayerError as error:
            return str(error)
    parent = parents[-1] if parents else None
    if isinstance(parent, keras.layers.TimeDistributed):
        # It calls `layer.call`, past `quantized_call`.
        return "stock Keras' TimeDistributed would take its codes for its weights"
    num_experts = getattr(parent, "num_experts", None)
    if num_experts is not None and type(layer) is keras.layers.Dense:
        if layer.units == num_experts:
            return "it routes tokens to experts, and rounding would change the choice"
        if layer.units == 1:
            return "it weighs the expert that all tokens share, for each token by one number"
    return None


@contextmanager
def watched_calls(
    layers: Iterable[keras.layers.Layer], watch: Callable[[keras.layers.Layer, Any], None]
) -> Iterator[None]:
    """Call `watch(layer, inputs)` whenever one of these layers is called, before it computes."""

    def call(
        layer: keras.layers.Layer, compute: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        watch(layer, args[0] if args else kwargs["inputs"])
        return compute(*args, **kwargs)

    watched = list(layers)
    for layer in watched:
        # Set on the instance, past Keras' tracking of attributes, and removed again below.
        object.__setattr__(layer, "call", partial(call, layer, layer.call))
    try:
        yield
    finally:
        for layer in watched:
            object.__delattr__(layer, "call")
