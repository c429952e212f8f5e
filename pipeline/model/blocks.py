"""Cut a model's functional graph into embed → transformer blocks → head.

The graph shows how each block is called; KerasHub's own list of blocks is incomplete (it misses
Gemma3's scaling, BLOOM's norm, OPT's positions). What passes between the blocks are numbered
*values*. Most models have a chain of blocks that hand on their hidden states; the decoder of an
encoder–decoder also takes the encoder's output, T5's blocks the position bias that the first one
makes, and some of Gemma4's blocks the keys and values of others. All else that blocks take (masks,
the embedded tokens of a decoder) depends on no block, and is computed once, by `embed`. What lies
between blocks, such as an encoder's last norm, is *glue*, which runs right before the first block
that needs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import keras
from keras import tree

from pipeline.errors import SourceError
from pipeline.model.block_signature import block_signature
from pipeline.model.graph import dependents, is_input, nodes_behind, replay, taken_tensors
from pipeline.model.skeleton import Skeleton
from pipeline.model.targets import (
    Target,
    Unsupported,
    find_targets,
    find_unsupported,
    holds_kernels,
)


@dataclass(frozen=True)
class _Taken:
    """Stands for one of a call's values among its arguments."""

    index: int


@dataclass(frozen=True, kw_only=True)
class Glue:
    """Operations between blocks."""

    model: keras.Model
    """From a list of values to a list of values."""
    takes: tuple[int, ...]
    gives: tuple[int, ...]
    """Numbers of these values."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a block, with the glue that runs before it."""

    block: int
    layer: keras.layers.Layer
    signature: str
    """Equal for calls that compute the same function, and so can share a compiled program."""
    arguments: tuple[Sequence[Any], Mapping[str, Any]]
    """Positional and keyword arguments, with stand-ins for values."""
    takes: tuple[int, ...]
    """Numbers of the values among its arguments, in their order."""
    gives: tuple[int, ...]
    """Numbers of those of its outputs that anything uses; a cache that nothing reads is none."""
    outputs: tuple[int, ...]
    """Positions of these among its outputs."""
    glue: Glue | None
    live: tuple[int, ...]
    """Numbers of the values that this call or anything after it uses, ascending."""

    def bind(self, values: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments to call `layer` with, given what it takes."""

        def fill(argument: Any) -> Any:
            return values[argument.index] if isinstance(argument, _Taken) else argument

        args, kwargs = self.arguments
        return (
            tuple(tree.map_structure(fill, argument) for argument in args),
            {name: tree.map_structure(fill, kwargs[name]) for name in sorted(kwargs)},
        )

    def given(self, output: Any) -> tuple[Any, ...]:
        """What the call gives, of the layer's output."""
        flat = tree.flatten(output)
        return tuple(flat[position] for position in self.outputs)


@dataclass(frozen=True, kw_only=True)
class Block:
    """One transformer block."""

    index: int
    layer: keras.layers.Layer
    calls: tuple[Call, ...]
    """One, but for blocks that share their weights."""
    targets: tuple[Target, ...]
    """Its Dense and EinsumDense layers, depth first."""
    unsupported: tuple[Unsupported, ...]

    @property
    def name(self) -> str:
        return str(self.layer.name)

    @property
    def signature(self) -> str:
        return self.calls[0].signature


@dataclass(frozen=True, kw_only=True)
class BlockGraph:
    """A model as embed → blocks → head."""

    blocks: tuple[Block, ...]
    calls: tuple[Call, ...]
    """Of all blocks, in the order in which they run."""
    embed: keras.Model
    """From the backbone's inputs to a list of values, which depend on no block."""
    embedded: tuple[int, ...]
    """Numbers of these values."""
    head: keras.Model
    """From [*values, *head_inputs] to the output of the task, or else of the backbone."""
    head_takes: tuple[int, ...]
    """Numbers of these values."""
    head_inputs: tuple[str, ...]
    """Names of the backbone's inputs that the head needs."""
    rest_targets: tuple[Target, ...]
    """Quantizable layers outside the blocks: embeddings, poolers, heads."""
    rest_unsupported: tuple[Unsupported, ...]
    encoders: tuple[keras.layers.Layer, ...]
    """Models within the backbone that only feed the blocks, such as a vision encoder."""

    @property
    def shared_blocks(self) -> tuple[Block, ...]:
        """Blocks that run more than once, so that none of their layers has a single input."""
        return tuple(block for block in self.blocks if len(block.calls) > 1)

    def carried(self, call: Call) -> tuple[int, ...]:
        """Of the values live at a call, those that blocks before it made."""
        return tuple(number for number in call.live if number not in self.embedded)

    def bind_head(self, values: Mapping[int, Any], inputs: Mapping[str, Any]) -> list[Any]:
        """The input of `head`, from the values that it takes and the backbone's inputs."""
        # Keras accepts a list of tensors or of arrays, but not a mixture.
        given = [values[number] for number in self.head_takes]
        given += [inputs[name] for name in self.head_inputs]
        return [keras.ops.convert_to_tensor(value) for value in given]


def find_blocks(skeleton: Skeleton) -> BlockGraph:
    """Cut a model at its blocks: top-level layers with Dense or EinsumDense layers inside.

    Raises:
        SourceError: there are none, or the model is no graph.
    """
    backbone = skeleton.backbone
    layers, encoders = _candidates(backbone)
    cut = _Cut(backbone, layers)
    calls = cut.calls()
    head, head_takes, head_inputs = _head(skeleton, cut)
    finished = cut.finished(calls, head_takes)
    # In the order of their first calls.
    order = list(dict.fromkeys(call.block for call in finished))
    assert order == list(range(len(order)))
    of_task = [] if skeleton.task is None else skeleton.task.layers
    rest = [one for one in (*backbone.layers, *of_task) if one not in (*layers, backbone)]
    return BlockGraph(
        blocks=tuple(
            Block(
                index=index,
                layer=layer,
                calls=tuple(call for call in finished if call.block == index),
                targets=find_targets([layer], prefix=layer.path),
                unsupported=find_unsupported([layer]),
            )
            for index, layer in enumerate(cut.layers)
        ),
        calls=finished,
        embed=keras.Model(backbone.input, list(cut.embedded.values()), name="embed"),
        embedded=tuple(cut.embedded),
        head=head,
        head_takes=head_takes,
        head_inputs=head_inputs,
        rest_targets=find_targets(rest, embeddings=True),
        rest_unsupported=find_unsupported(rest),
        encoders=encoders,
    )


def find_encoders(backbone: Any) -> tuple[keras.layers.Layer, ...]:
    """Models within a backbone, beside its blocks, such as a vision encoder.

    Raises:
        SourceError: as `find_blocks`.
    """
    return _candidates(backbone)[1]


def _candidates(
    backbone: Any,
) -> tuple[list[keras.layers.Layer], tuple[keras.layers.Layer, ...]]:
    """The layers that can be blocks, and models beside them, such as a vision encoder."""
    if not getattr(backbone, "inputs", None):
        raise SourceError(f"{backbone.name}: not a functional model, so its blocks cannot be found")
    found = [layer for layer in backbone.layers if layer._layers and holds_kernels(layer)]
    if not found:
        raise SourceError(
            f"{backbone.name}: no transformer blocks with Dense or EinsumDense layers in it"
        )
    blocks = [layer for layer in found if not isinstance(layer, keras.Model)]
    if not blocks:
        return found, ()
    return blocks, tuple(layer for layer in found if layer not in blocks)


@dataclass(kw_only=True)
class _OpenCall:
    """A call before it is known which of its outputs are used."""

    node: Any
    takes: tuple[int, ...]
    gives: tuple[int, ...]
    glue: Glue | None


class _Cut:
    """The cut of a backbone at its blocks' calls, in the order in which they run.

    Attributes:
        layers: the blocks, in the order of their first calls.
        embedded: tensors that depend on no block, by the number of their value.
    """

    def __init__(self, backbone: Any, layers: Sequence[keras.layers.Layer]) -> None:
        nodes = nodes_behind(tree.flatten(backbone.output))
        self._nodes = [node for node in nodes if node.operation in layers]
        self.layers: list[Any] = list(dict.fromkeys(node.operation for node in self._nodes))
        self.embedded: dict[int, Any] = {}
        self._dependents = dependents(nodes, layers)
        self._free = count()
        # Of every value made so far, by the id of its tensor.
        self._numbers: dict[int, int] = {}

    def calls(self) -> list[_OpenCall]:
        """Every call of a block, numbering the values as they are made."""
        found = []
        for node in self._nodes:
            glue = self._glue(taken_tensors(node))
            takes = tuple(self._number(tensor) for tensor in taken_tensors(node))
            gives = tuple(self._make(tensor) for tensor in node.output_tensors)
            found.append(_OpenCall(node=node, takes=takes, gives=gives, glue=glue))
        return found

    def finished(self, calls: Sequence[_OpenCall], head_takes: Sequence[int]) -> tuple[Call, ...]:
        """The calls, each with what is live before it, and the outputs that anything uses."""
        live = set(head_takes)
        found = []
        for call in reversed(calls):
            outputs = tuple(i for i, number in enumerate(call.gives) if number in live)
            gives = tuple(call.gives[i] for i in outputs)
            live = (live - set(gives)) | set(call.takes)
            layer = call.node.operation
            found.append(
                Call(
                    block=self.layers.index(layer),
                    layer=layer,
                    signature=block_signature(layer, f"{_describe(call)} {outputs}"),
                    arguments=_stand_ins(call.node),
                    takes=call.takes,
                    gives=gives,
                    outputs=outputs,
                    glue=call.glue,
                    live=tuple(sorted(live)),
                )
            )
            if call.glue is not None:
                live = (live - set(call.glue.gives)) | set(call.glue.takes)
        return tuple(reversed(found))

    def made(self, tensor: Any) -> int | None:
        """The number of a value that blocks or glue have made; None of any other tensor."""
        return self._numbers.get(id(tensor)) if id(tensor) in self._dependents else None

    def _make(self, tensor: Any) -> int:
        number = self._numbers[id(tensor)] = next(self._free)
        return number

    def _number(self, tensor: Any) -> int:
        """The number of a value that is made, or that `embed` is to make."""
        if id(tensor) not in self._numbers:
            self.embedded[self._make(tensor)] = tensor
        return self._numbers[id(tensor)]

    def _glue(self, tensors: Sequence[Any]) -> Glue | None:
        """What computes those of the tensors that depend on blocks, but are not made yet."""
        missing = [
            tensor
            for tensor in tensors
            if id(tensor) in self._dependents and id(tensor) not in self._numbers
        ]
        if not missing:
            return None
        inputs: dict[int, Any] = {}

        def enter(tensor: Any) -> Any | None:
            if id(tensor) in self._dependents and id(tensor) not in self._numbers:
                return None
            number = self._number(tensor)
            return inputs.setdefault(number, _input_like(tensor, f"value_{number}"))

        outputs = replay(missing, {}, enter)
        return Glue(
            model=_piece(list(inputs.values()), outputs, "glue"),
            takes=tuple(inputs),
            gives=tuple(self._make(tensor) for tensor in missing),
        )


def _input_like(tensor: Any, name: str) -> Any:
    return keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=name)


def _piece(inputs: list[Any], outputs: Any, name: str) -> keras.Model:
    """A model of a part of the graph, which takes arrays of any length.

    A layer may state another shape than it makes: with images, KerasHub's Gemma3 states the length
    of one image for that of the text.
    """
    model = keras.Model(inputs, outputs, name=name)
    model.input_spec = None
    return model


def _stand_ins(node: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """A call's arguments, with stand-ins for tensors."""
    indices = {id(tensor): index for index, tensor in enumerate(taken_tensors(node))}

    def stand_in(argument: Any) -> Any:
        return _Taken(indices[id(argument)]) if id(argument) in indices else argument

    arguments = node.arguments
    return (
        tuple(tree.map_structure(stand_in, argument) for argument in arguments.args),
        {name: tree.map_structure(stand_in, value) for name, value in arguments.kwargs.items()},
    )


def _describe(call: _OpenCall) -> str:
    """How a block is called, as text that is the same in every process."""
    indices = {id(tensor): index for index, tensor in enumerate(taken_tensors(call.node))}

    def describe(argument: Any) -> str:
        if isinstance(argument, keras.KerasTensor):
            return f"{indices[id(argument)]}{argument.shape}{argument.dtype}"
        return repr(argument)

    args, kwargs = call.node.arguments.args, sorted(call.node.arguments.kwargs.items())
    named = [(name, tree.map_structure(describe, value)) for name, value in kwargs]
    return f"{tree.map_structure(describe, list(args))} {named}"


def _head(skeleton: Skeleton, cut: _Cut) -> tuple[keras.Model, tuple[int, ...], tuple[str, ...]]:
    """The model from what the blocks give to the end of the backbone, then of the task.

    Returns:
        the model, numbers of the values and names of the backbone's inputs that it takes.
    """
    backbone, task = skeleton.backbone, skeleton.task
    values: dict[int, Any] = {}
    inputs: dict[str, Any] = {}

    def enter(tensor: Any) -> Any | None:
        number = cut.made(tensor)
        if number is not None:
            return values.setdefault(number, _input_like(tensor, f"value_{number}"))
        if is_input(tensor):
            name = str(tensor._keras_history.operation.name)
            return inputs.setdefault(name, _input_like(tensor, name))
        return None

    if task is None:
        output = replay(backbone.output, {}, enter)
    else:
        nodes = nodes_behind(tree.flatten(task.output))
        calls = [node for node in nodes if node.operation is backbone]
        if len(calls) != 1:
            raise SourceError(
                f"{task.name}: calls its backbone {len(calls)} times where once is expected; this "
                f"{type(task).__name__} cannot be quantized block by block (docs/support.md lists "
                "what can)"
            )
        outputs = dict(
            zip(map(id, calls[0].output_tensors), tree.flatten(backbone.output), strict=True)
        )
        given: dict[int, Any] = {}

        def enter_task(tensor: Any) -> Any | None:
            # Only those of the backbone's outputs that the task uses.
            if id(tensor) in outputs:
                return replay(outputs[id(tensor)], given, enter)
            return enter(tensor)

        output = replay(task.output, {}, enter_task)
    model = _piece([*values.values(), *inputs.values()], output, "head")
    return model, tuple(values), tuple(inputs)
