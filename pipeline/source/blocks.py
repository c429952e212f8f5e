"""A backbone's functional graph, cut into what comes before its blocks, the blocks, and the rest.

The graph says what a block is called with; KerasHub's own list of blocks does not (it misses
Gemma3's scaling, BLOOM's norm, OPT's positions). A stream of activations enters block 0, each
block turns it into the next, and what else blocks ask for (masks) is a side input, computed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import keras
from keras import tree

from pipeline.errors import SourceError
from pipeline.source.block_kind import block_kind
from pipeline.source.functional_graph import behind, replay
from pipeline.source.quantizable import (
    Target,
    Unsupported,
    find_targets,
    find_unsupported,
    holds_kernels,
)
from pipeline.source.skeleton import Skeleton


@dataclass(frozen=True)
class _Side:
    """Stands for a side input among a block's arguments."""

    index: int


@dataclass(frozen=True)
class _Stream:
    """Stands for the stream among a block's arguments."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """One transformer block.

    Attributes:
        index: its place in the chain, from 0.
        layer: the Keras layer.
        kind: equal for blocks that one compiled program serves, given other variable values.
        targets: its Dense and EinsumDense layers, depth first.
        unsupported: what has matrices but cannot be quantized, with the reason.
        arguments: positional and keyword arguments of its call, with stand-ins for tensors.
    """

    index: int
    layer: keras.layers.Layer
    kind: str
    targets: tuple[Target, ...]
    unsupported: tuple[Unsupported, ...]
    arguments: tuple[Sequence[Any], Mapping[str, Any]]

    @property
    def name(self) -> str:
        return str(self.layer.name)

    def bind(self, stream: Any, sides: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of `layer(...)` or `layer.stateless_call(trainable, other, ...)`.

        Args:
            stream: [batch, sequence, hidden], from the block before, or from `embed`.
            sides: all of `embed`'s outputs after the first.
        """

        def fill(argument: Any) -> Any:
            if isinstance(argument, _Side):
                return sides[argument.index]
            return stream if isinstance(argument, _Stream) else argument

        args, kwargs = self.arguments
        return (
            tuple(tree.map_structure(fill, argument) for argument in args),
            {name: tree.map_structure(fill, kwargs[name]) for name in sorted(kwargs)},
        )


@dataclass(frozen=True, kw_only=True)
class BlockGraph:
    """A model as embed → blocks → head.

    Attributes:
        blocks: in order; each one's stream is the output of the one before.
        embed: model from the backbone's inputs to [stream, *sides].
        head: model from [stream, *head_inputs] to the task's output (logits, say), or to the
            backbone's where there is no task.
        head_inputs: names of the backbone's inputs that the head needs beside the stream.
        rest_targets: quantizable layers outside the blocks (embeddings, poolers, heads).
        rest_unsupported: what has matrices there, but cannot be quantized.
    """

    blocks: tuple[Block, ...]
    embed: keras.Model
    head: keras.Model
    head_inputs: tuple[str, ...]
    rest_targets: tuple[Target, ...]
    rest_unsupported: tuple[Unsupported, ...]

    def bind_head(self, stream: Any, inputs: Mapping[str, Any]) -> list[Any]:
        """The input of `head`, from the last block's output and the backbone's inputs."""
        # Keras takes tensors or arrays in one list, never both.
        given = [stream, *(inputs[name] for name in self.head_inputs)]
        return [keras.ops.convert_to_tensor(value) for value in given]


def find_blocks(skeleton: Skeleton) -> BlockGraph:
    """Cut a model at its blocks: the composite layers with kernels that the stream runs through.

    Raises:
        SourceError: the blocks do not form a chain, or there are none.
    """
    backbone = skeleton.backbone
    layers = _chain(backbone)
    sides: dict[int, Any] = {}
    stream = _stream_input(layers)
    entry = stream
    blocks = []
    for index, layer in enumerate(layers):
        node = layer._inbound_nodes[0]
        blocks.append(
            Block(
                index=index,
                layer=layer,
                kind=block_kind(layer, _describe(node, stream)),
                targets=find_targets([layer], prefix=layer.path),
                unsupported=find_unsupported([layer]),
                arguments=_stand_ins(node, stream, sides),
            )
        )
        stream = node.output_tensors[0]
    _refuse_shortcuts(backbone, layers, sides, stream)
    embed = keras.Model(backbone.input, [entry, *sides.values()], name="embed")
    head, head_inputs = _head(skeleton, stream)
    rest = [layer for layer in _operations(skeleton) if layer not in layers]
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
        raise SourceError(f"{backbone.name}: not a functional model, so its blocks are hidden")
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


def _stream_input(blocks: list[keras.layers.Layer]) -> Any:
    """The tensor that enters block 0: where block 1 takes block 0's output, block 0 takes it."""
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
    node: Any, stream: Any, sides: dict[int, Any]
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    def stand_in(argument: Any) -> Any:
        if argument is stream:
            return _Stream()
        if isinstance(argument, keras.KerasTensor):
            sides.setdefault(id(argument), argument)
            return _Side(list(sides).index(id(argument)))
        return argument

    arguments = node.arguments
    return (
        tuple(tree.map_structure(stand_in, argument) for argument in arguments.args),
        {name: tree.map_structure(stand_in, value) for name, value in arguments.kwargs.items()},
    )


def _describe(node: Any, stream: Any) -> str:
    """How a block is called, in words that are the same in every process."""

    def describe(argument: Any) -> str:
        if isinstance(argument, keras.KerasTensor):
            return f"{'stream' if argument is stream else 'side'}{argument.shape}{argument.dtype}"
        return repr(argument)

    arguments = node.arguments
    named = {
        name: tree.map_structure(describe, arguments.kwargs[name]) for name in arguments.kwargs
    }
    return f"{tree.map_structure(describe, list(arguments.args))} {sorted(named.items())}"


def _refuse_shortcuts(
    backbone: Any, blocks: list[keras.layers.Layer], sides: dict[int, Any], last: Any
) -> None:
    """Nothing but the next block may use what a block gives, nor the head what is inside."""
    for tensor in sides.values():
        for node in behind([tensor]):
            if node.operation in blocks:
                raise _no_chain(backbone, node.operation, "a later block uses more than its stream")
    for node in behind(tree.flatten(backbone.output), {id(last)}):
        if node.operation in blocks:
            raise _no_chain(
                backbone, node.operation, "the model's output uses it past later blocks"
            )


def _head(skeleton: Skeleton, last: Any) -> tuple[keras.Model, tuple[str, ...]]:
    """From the last block's output on: the backbone's end, then the task around it."""
    backbone, task = skeleton.backbone, skeleton.task
    stream = keras.Input(batch_shape=last.shape, dtype=last.dtype, name="stream")
    inputs: dict[str, Any] = {}
    output = replay(backbone.output, {id(last): stream}, inputs)
    if task is not None:
        node = _backbone_call(backbone, task)
        given = dict(zip(map(id, node.output_tensors), tree.flatten(output), strict=True))
        output = replay(task.output, given, inputs)
    return keras.Model([stream, *inputs.values()], output, name="head"), tuple(inputs)


def _backbone_call(backbone: Any, task: Any) -> Any:
    """The node by which a task calls its backbone."""
    calls = {
        id(node): node for node in behind(tree.flatten(task.output)) if node.operation is backbone
    }
    if len(calls) != 1:
        raise SourceError(
            f"{task.name}: calls its backbone {len(calls)} times where once is expected; such a "
            f"{type(task).__name__} cannot be quantized block by block"
        )
    return next(iter(calls.values()))


def _operations(skeleton: Skeleton) -> list[keras.layers.Layer]:
    """All top-level layers: the backbone's, then those that the task adds."""
    layers = list(skeleton.backbone.layers)
    if skeleton.task is not None:
        layers += [layer for layer in skeleton.task.layers if layer is not skeleton.backbone]
    return layers


def _no_chain(backbone: Any, layer: keras.layers.Layer, reason: str) -> SourceError:
    return SourceError(
        f"{backbone.name}: {layer.name} is not one of a chain of blocks ({reason}); a "
        f"{type(backbone).__name__} cannot be quantized block by block"
    )
