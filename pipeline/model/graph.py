"""Walk a functional Keras graph, and rebuild parts of it.

A tensor stands for itself by `id`: Keras' symbolic tensors cannot be compared. A node is one call
of an operation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import keras
from keras import tree


def nodes_behind(tensors: Iterable[Any]) -> list[Any]:
    """Every call that tensors depend on, each after those that it depends on."""
    seen: set[int] = set()
    ordered = []
    pending = [(node_of(tensor), False) for tensor in reversed(list(tensors))]
    while pending:
        node, done = pending.pop()
        if done:
            ordered.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            pending.append((node, True))
            pending.extend((node_of(tensor), False) for tensor in reversed(node.input_tensors))
    return ordered


def node_of(tensor: Any) -> Any:
    """The call that made a tensor."""
    operation, node_index, _ = tensor._keras_history
    return operation._inbound_nodes[node_index]


def dependents(nodes: Iterable[Any], layers: Collection[Any]) -> set[int]:
    """The ids of all tensors that depend on a call of these layers.

    Args:
        nodes: as `nodes_behind` orders them.
    """
    wanted = set(map(id, layers))
    found: set[int] = set()
    for node in nodes:
        if id(node.operation) in wanted or any(id(t) in found for t in node.input_tensors):
            found.update(map(id, node.output_tensors))
    return found


def taken_tensors(node: Any) -> list[Any]:
    """The tensors among a call's arguments, in order, each once."""
    arguments = tree.flatten((node.arguments.args, node.arguments.kwargs))
    return list({id(t): t for t in arguments if isinstance(t, keras.KerasTensor)}.values())


def is_input(tensor: Any) -> bool:
    """Whether a tensor is an input of its model."""
    return isinstance(tensor._keras_history.operation, keras.layers.InputLayer)


def replay(output: Any, given: dict[int, Any], enter: Callable[[Any], Any | None]) -> Any:
    """Rebuild tensors from others.

    `keras.Model` of Keras 3.15 fails to cut a graph at a tensor that is an output too, as in BERT.

    Args:
        output: a structure of tensors.
        given: replacements, by the id of the tensor that they replace; receives what is rebuilt.
        enter: gives a tensor's replacement, or None if it is to be rebuilt; asked once for each.
    """

    def compute(tensor: Any) -> Any:
        if not isinstance(tensor, keras.KerasTensor):
            return tensor
        if id(tensor) not in given:
            entered = enter(tensor)
            if entered is not None:
                given[id(tensor)] = entered
            else:
                node = node_of(tensor)
                args, kwargs = tree.map_structure(
                    compute, (node.arguments.args, node.arguments.kwargs)
                )
                results = tree.flatten(node.operation(*args, **kwargs))
                given.update(zip(map(id, node.output_tensors), results, strict=True))
        return given[id(tensor)]

    return tree.map_structure(compute, output)
