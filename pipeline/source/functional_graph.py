"""Walk and repeat parts of a Keras functional graph, from tensor to tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from typing import Any

import keras
from keras import tree


def behind(tensors: Iterable[Any], ends: Set[int] = frozenset()) -> Iterator[Any]:
    """Every call (node) that tensors come from, up to the model's inputs or `ends` (ids)."""
    seen: set[int] = set(ends)
    pending = list(tensors)
    while pending:
        tensor = pending.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        operation, node_index, _ = tensor._keras_history
        node = operation._inbound_nodes[node_index]
        yield node
        pending.extend(node.input_tensors)


def replay(output: Any, given: dict[int, Any], inputs: dict[str, Any]) -> Any:
    """Compute a graph's output again, from given tensors (by the id of those they replace).

    Not `keras.Model(last, output)`: Keras 3.15 fails when an output is itself an input, as in
    BERT. Inputs that turn out to be needed are added to `inputs` by name.
    """

    def compute(tensor: Any) -> Any:
        if not isinstance(tensor, keras.KerasTensor):
            return tensor
        if id(tensor) not in given:
            operation, node_index, _ = tensor._keras_history
            if isinstance(operation, keras.layers.InputLayer):
                again = keras.Input(
                    batch_shape=tensor.shape, dtype=tensor.dtype, name=operation.name
                )
                given[id(tensor)] = inputs.setdefault(str(operation.name), again)
            else:
                node = operation._inbound_nodes[node_index]
                args, kwargs = tree.map_structure(
                    compute, (node.arguments.args, node.arguments.kwargs)
                )
                results = tree.flatten(operation(*args, **kwargs))
                given.update(zip(map(id, node.output_tensors), results, strict=True))
        return given[id(tensor)]

    return tree.map_structure(compute, output)
