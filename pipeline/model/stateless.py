"""Call Keras layers as pure functions of their weights, and see what reaches the layers inside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import keras

from pipeline.model.targets import Target


def call_with(layer: Any, values: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
    """`layer(*args, **kwargs)` with values for its weights, in the order of `layer.weights`."""
    mapping = list(zip(layer.weights, values, strict=True))
    with keras.StatelessScope(state_mapping=mapping):
        return layer(*args, **kwargs)


@contextmanager
def recorded_inputs(targets: Iterable[Target]) -> Iterator[list[tuple[Target, Any]]]:
    """Record the first argument of every call of these layers, in the order of the calls.

    Yields:
        a list that grows with each call: the target, and the tensor that it was called with.
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
