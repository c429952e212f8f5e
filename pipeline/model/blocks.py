"""Cut a model's functional graph into embed → transformer blocks → head.

The graph shows how each block is called; KerasHub's own list of blocks is incomplete (it misses
Gemma3's scaling, BLOOM's norm, OPT's positions). Hidden states pass through the chain of blocks;
all else that blocks take (masks) is a side input, computed once.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import keras
import numpy as np
from keras import tree

from pipeline.errors import SourceError
from pipeline.model.skeleton import Skeleton
from pipeline.model.targets import (
    Target,
    Unsupported,
    find_targets,
    find_unsupported,
    holds_kernels,
)


@dataclass(frozen=True)
class _SideInput:
    """Stands for a side input among a block's arguments."""

    index: int


@dataclass(frozen=True)
class _HiddenStates:
    """Stands for the hidden states among a block's arguments."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """One transformer block."""

    index: int
    layer: keras.layers.Layer
    signature: str
    """Equal for blocks that compute the same function, and so can share a compiled program."""
    targets: tuple[Target, ...]
    """Its Dense and EinsumDense layers, depth first."""
    unsupported: tuple[Unsupported, ...]
    arguments: tuple[Sequence[Any], Mapping[str, Any]]
    """Positional and keyword arguments of its call, with stand-ins for tensors."""

    @property
    def name(self) -> str:
        return str(self.layer.name)

    def bind(
        self, hidden_states: Any, side_inputs: Sequence[Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments to call `layer` with.

        Args:
            hidden_states: [batch, sequence, hidden].
            side_inputs: all of `embed`'s outputs after the first.
        """

        def fill(argument: Any) -> Any:
            if isinstance(argument, _SideInput):
                return side_inputs[argument.index]
            return hidden_states if isinstance(argument, _HiddenStates) else argument

        args, kwargs = self.arguments
        return (
            tuple(tree.map_structure(fill, argument) for argument in args),
            {name: tree.map_structure(fill, kwargs[name]) for name in sorted(kwargs)},
        )


@dataclass(frozen=True, kw_only=True)
class BlockGraph:
    """A model as embed → blocks → head."""

    blocks: tuple[Block, ...]
    embed: keras.Model
    """From the backbone's inputs to [hidden_states, *side_inputs]."""
    head: keras.Model
    """From [hidden_states, *head_inputs] to the output of the task, or else of the backbone."""
    head_inputs: tuple[str, ...]
    """Names of the backbone's inputs that the head needs."""
    rest_targets: tuple[Target, ...]
    """Quantizable layers outside the blocks: embeddings, poolers, heads."""
    rest_unsupported: tuple[Unsupported, ...]

    def bind_head(self, hidden_states: Any, inputs: Mapping[str, Any]) -> list[Any]:
        """The input of `head`, from the last block's output and the backbone's inputs."""
        # Keras accepts a list of tensors or of arrays, but not a mixture.
        given = [hidden_states, *(inputs[name] for name in self.head_inputs)]
        return [keras.ops.convert_to_tensor(value) for value in given]


def find_blocks(skeleton: Skeleton) -> BlockGraph:
    """Cut a model at its blocks: top-level layers with Dense or EinsumDense layers inside.

    Raises:
        SourceError: the blocks do not form a chain, or there are none.
    """
    backbone = skeleton.backbone
    layers = _chain(backbone)
    side_inputs: dict[int, Any] = {}
    hidden_states = _first_hidden_states(layers)
    entry = hidden_states
    blocks = []
    for index, layer in enumerate(layers):
        node = layer._inbound_nodes[0]
        blocks.append(
            Block(
                index=index,
                layer=layer,
                signature=block_signature(layer, _describe(node, hidden_states)),
                targets=find_targets([layer], prefix=layer.path),
                unsupported=find_unsupported([layer]),
                arguments=_stand_ins(node, hidden_states, side_inputs),
            )
        )
        hidden_states = node.output_tensors[0]
    _refuse_shortcuts(backbone, layers, side_inputs, hidden_states)
    embed = keras.Model(backbone.input, [entry, *side_inputs.values()], name="embed")
    head, head_inputs = _head(skeleton, hidden_states)
    of_task = [] if skeleton.task is None else skeleton.task.layers
    rest = [one for one in (*backbone.layers, *of_task) if one not in (*layers, backbone)]
    return BlockGraph(
        blocks=tuple(blocks),
        embed=embed,
        head=head,
        head_inputs=head_inputs,
        rest_targets=find_targets(rest, embeddings=True),
        rest_unsupported=find_unsupported(rest),
    )


def _chain(backbone: Any) -> list[keras.layers.Layer]:
    """The backbone's blocks, each fed by the one before."""
    if not getattr(backbone, "inputs", None):
        raise SourceError(f"{backbone.name}: not a functional model, so its blocks cannot be found")
    candidates = [layer for layer in backbone.layers if layer._layers and holds_kernels(layer)]
    if not candidates:
        raise SourceError(
            f"{backbone.name}: no transformer blocks with Dense or EinsumDense layers in it"
        )
    for layer in candidates:
        node = layer._inbound_nodes[0]
        if len(node.output_tensors) != 1:
            raise _no_chain(backbone, layer, f"it has {len(node.output_tensors)} outputs")
    for before, layer in pairwise(candidates):
        output = before._inbound_nodes[0].output_tensors[0]
        if not any(tensor is output for tensor in layer._inbound_nodes[0].input_tensors):
            raise _no_chain(backbone, layer, f"it is not fed by {before.name} directly")
    return candidates


def _first_hidden_states(blocks: list[keras.layers.Layer]) -> Any:
    """The tensor that enters block 0: the argument that in block 1 is block 0's output."""
    node = blocks[0]._inbound_nodes[0]
    output = node.output_tensors[0]
    if len(blocks) > 1:
        following = _slots(blocks[1]._inbound_nodes[0])
        [slot] = [slot for slot, tensor in following.items() if tensor is output]
        return _slots(node)[slot]
    return next(
        tensor
        for tensor in node.input_tensors
        if tensor.shape == output.shape and tensor.dtype == output.dtype
    )


def _slots(node: Any) -> dict[int | str, Any]:
    """A call's arguments by position or keyword."""
    return {**dict(enumerate(node.arguments.args)), **node.arguments.kwargs}


def _stand_ins(
    node: Any, hidden_states: Any, side_inputs: dict[int, Any]
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    def stand_in(argument: Any) -> Any:
        if argument is hidden_states:
            return _HiddenStates()
        if isinstance(argument, keras.KerasTensor):
            side_inputs.setdefault(id(argument), argument)
            return _SideInput(list(side_inputs).index(id(argument)))
        return argument

    arguments = node.arguments
    return (
        tuple(tree.map_structure(stand_in, argument) for argument in arguments.args),
        {name: tree.map_structure(stand_in, value) for name, value in arguments.kwargs.items()},
    )


def _describe(node: Any, hidden_states: Any) -> str:
    """How a block is called, as text that is the same in every process."""

    def describe(argument: Any) -> str:
        if isinstance(argument, keras.KerasTensor):
            role = "hidden_states" if argument is hidden_states else "side_input"
            return f"{role}{argument.shape}{argument.dtype}"
        return repr(argument)

    args, kwargs = list(node.arguments.args), sorted(node.arguments.kwargs.items())
    named = [(name, tree.map_structure(describe, value)) for name, value in kwargs]
    return f"{tree.map_structure(describe, args)} {named}"


def _refuse_shortcuts(
    backbone: Any, blocks: list[keras.layers.Layer], side_inputs: dict[int, Any], last: Any
) -> None:
    """Check that only the next block uses a block's output, and only the head the last one's."""
    for nodes, reason in (
        (_behind(side_inputs.values()), "a later block uses more than its hidden states"),
        (
            _behind(tree.flatten(backbone.output), {id(last)}),
            "the model's output uses it past later blocks",
        ),
    ):
        for node in nodes:
            if node.operation in blocks:
                raise _no_chain(backbone, node.operation, reason)


def _head(skeleton: Skeleton, last: Any) -> tuple[keras.Model, tuple[str, ...]]:
    """The model from the last block's output to the end of the backbone, then of the task."""
    backbone, task = skeleton.backbone, skeleton.task
    hidden_states = keras.Input(batch_shape=last.shape, dtype=last.dtype, name="hidden_states")
    inputs: dict[str, Any] = {}
    output = _replay(backbone.output, {id(last): hidden_states}, inputs)
    if task is not None:
        nodes = _behind(tree.flatten(task.output))
        calls = {id(node): node for node in nodes if node.operation is backbone}
        if len(calls) != 1:
            raise SourceError(
                f"{task.name}: calls its backbone {len(calls)} times where once is expected; this "
                f"{type(task).__name__} cannot be quantized block by block"
            )
        [call] = calls.values()
        given = dict(zip(map(id, call.output_tensors), tree.flatten(output), strict=True))
        output = _replay(task.output, given, inputs)
    return keras.Model([hidden_states, *inputs.values()], output, name="head"), tuple(inputs)


def _no_chain(backbone: Any, layer: keras.layers.Layer, reason: str) -> SourceError:
    return SourceError(
        f"{backbone.name}: {layer.name} is not one of a chain of blocks ({reason}); a "
        f"{type(backbone).__name__} cannot be quantized block by block"
    )


def _behind(tensors: Iterable[Any], ends: Set[int] = frozenset()) -> Iterator[Any]:
    """Every call (graph node) that tensors depend on, back to the inputs or to `ends` (ids)."""
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


def _replay(output: Any, given: dict[int, Any], inputs: dict[str, Any]) -> Any:
    """Rebuild a graph's output; `keras.Model` of Keras 3.15 fails if it is an input, as in BERT.

    Args:
        given: replacements, by the id of the tensor that they replace.
        inputs: receives the model inputs that are needed, by name.
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


# Attributes that do not affect what a layer computes.
_IGNORED = frozenset({"name", "path", "parent_path", "built", "trainable", "dtype_policy"})


def block_signature(layer: keras.layers.Layer, call: str) -> str:
    """A digest of a block's classes, settings, shapes and dtypes of variables, and its call.

    Settings are read from the layers' attributes: KerasHub's `get_config()` raises for some blocks
    and omits arguments of others.
    """
    described = [call, *_describe_layer(layer, "")]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


def _describe_layer(layer: keras.layers.Layer, position: str) -> Iterator[str]:
    layer_class = type(layer)
    settings = {
        name: text
        for name, value in sorted(vars(layer).items())
        if name.lstrip("_") not in _IGNORED and (text := _plain(value)) is not None
    }
    variables = [
        (str(variable.name), list(variable.shape), str(variable.dtype))
        for variable in [*layer._trainable_variables, *layer._non_trainable_variables]
    ]
    dtypes = (str(layer.dtype_policy.name), str(layer.compute_dtype))
    names = (layer_class.__module__, layer_class.__qualname__)
    yield json.dumps([position, *names, settings, variables, dtypes])
    for index, inner in enumerate(layer._layers):
        yield from _describe_layer(inner, f"{position}/{index}")


def _plain(value: Any) -> str | None:
    """A setting as text that is the same in every process; None if the value is not a setting."""
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, functools.partial):
        return _plain([value.func, value.args, value.keywords])
    if isinstance(value, Mapping):
        return _plain([[str(key), value[key]] for key in value])
    if isinstance(value, list | tuple):
        parts = [_plain(part) for part in value]
        return None if None in parts else f"[{', '.join(map(str, parts))}]"
    if isinstance(value, np.ndarray) or keras.ops.is_tensor(value):
        array = np.ascontiguousarray(value)
        return f"{array.shape} {array.dtype} {hashlib.sha256(array.tobytes()).hexdigest()}"
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return None
