"""A whole model's answer with one block in memory at a time: of the source, or of the artifact.

The artifact's blocks are run by Keras' own quantized layers, from the very bytes that were
committed, so this is the answer that stock Keras gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import keras
import numpy as np
from jax import Array
from numpy.typing import NDArray

from pipeline.artifact.parts import decode_part
from pipeline.commits import committed_file
from pipeline.compute.inputs import model_inputs, text_inputs
from pipeline.compute.model_state import ModelState
from pipeline.source.blocks import BlockGraph
from pipeline.storage.object_store import ObjectStore

Pairs = list[tuple[Any, NDArray[Any]]]
"""A model's variables, each with its value."""


class StreamedModel:
    """embed → blocks → head, each part's values read when it is its turn."""

    def __init__(self, graph: BlockGraph, read: Callable[[int], Pairs]) -> None:
        """Nothing is read yet.

        Args:
            graph: of the model, weightless.
            read: gives the values of a part: 0 is what is outside the blocks, i + 1 block i.
        """
        self.graph = graph
        self._read = read
        self._programs: dict[tuple[str, int], Any] = {}

    @property
    def num_blocks(self) -> int:
        return len(self.graph.blocks)

    def embed(self, batches: Sequence[tuple[NDArray[np.int32], NDArray[np.bool_]]]) -> list[Any]:
        """[stream, *sides] of each micro-batch of tokens and mask, [batch, sequence]."""
        embed = self.graph.embed
        pairs = self._read(0)
        program = self._program("embed", embed, pairs)
        values = [value for _, value in pairs]
        return [program(values, [model_inputs(embed, *batch)], {}) for batch in batches]

    def advance(self, block: int, states: list[Any]) -> None:
        """Send every micro-batch through one block, in place."""
        pairs = self._read(block + 1)
        values = [value for _, value in pairs]
        cut = self.graph.blocks[block]
        # Blocks of one kind list their variables alike: one program serves them.
        program = self._program(cut.kind, cut.layer, pairs)
        for state in states:
            args, kwargs = cut.bind(state[0], state[1:])
            state[0] = np.asarray(program(values, list(args), kwargs))

    def head(self) -> Callable[[Any, Any, Any], Array]:
        """The function (stream, tokens, mask) → the model's output."""
        head = self.graph.head
        pairs = self._read(0)
        program = self._program("head", head, pairs)
        values = [value for _, value in pairs]

        def run(stream: Any, tokens: NDArray[np.int32], mask: NDArray[np.bool_]) -> Array:
            given = self.graph.bind_head(stream, text_inputs(tokens, mask))
            return program(values, [given], {})  # type: ignore[no-any-return]

        return run

    def _program(self, name: str, layer: Any, pairs: Pairs) -> Any:
        key = (name, len(pairs))
        if key not in self._programs:
            variables = [variable for variable, _ in pairs]

            def call(values: Sequence[Array], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
                mapping = list(zip(variables, values, strict=True))
                with keras.StatelessScope(state_mapping=mapping):
                    return layer(*args, **kwargs)

            self._programs[key] = jax.jit(call)
        return self._programs[key]


def source_model(model: ModelState) -> StreamedModel:
    """The source, in its own dtype where this machine can."""
    skeleton, _ = model.evaluated
    own = {str(v.path): v for v in skeleton.model.variables}

    def read(part: int) -> Pairs:
        values = model.read(part)
        return [(own[path], _cast(values[path], own[path])) for path in values]

    return StreamedModel(model.evaluated_graphs[0], read)


def artifact_model(model: ModelState, store: ObjectStore) -> StreamedModel:
    """The artifact, from its committed files."""
    _, skeleton = model.evaluated
    for layer in skeleton.backbone._flatten_layers():
        # What Keras' loader sets when it reads such a layer's variables.
        mode = getattr(layer, "quantization_mode", None)
        if mode in ("gptq", "awq"):
            setattr(layer, f"is_{mode}_calibrated", True)
    own = {stored.place: stored.variable for stored in skeleton.stored}
    of_backbone = {id(variable) for variable in skeleton.backbone.variables}
    rest_of_task = {str(v.path): v for v in skeleton.model.variables if id(v) not in of_backbone}

    def read(part: int) -> Pairs:
        values = decode_part(model.parts[part], committed_file(store, part))
        pairs = [(own[place], _cast(value, own[place])) for place, value in values.items()]
        if part == 0 and rest_of_task:
            found = model.read(0)
            pairs += [(v, _cast(found[p], v)) for p, v in rest_of_task.items() if p in found]
        return pairs

    return StreamedModel(model.evaluated_graphs[1], read)


def _cast(value: NDArray[Any], variable: Any) -> NDArray[Any]:
    return np.asarray(value, np.dtype(variable.dtype))
