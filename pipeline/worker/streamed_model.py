"""A model that runs part by part, with one block in memory at a time.

A source runs in its own dtype. An artifact is run by Keras' own quantized layers, in its own dtype,
from the very bytes that were committed, so its output is that of stock Keras.

Most of a model is compiled. What its layers round at run time is not: compiled code fuses
operations and so differs in the last bits, which rounding turns into whole steps, and each step
moves what later blocks round. SmolLM2-135M at int8 differs by 0.4% in perplexity between
`model.predict`, which compiles, and `model(inputs)`, which does not; neither is the more accurate.
Such models therefore run one operation after another, and give bit for bit what `model(inputs)`
gives in stock Keras.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax import Array
from keras import tree
from numpy.typing import NDArray

from pipeline.artifact.parts import decode_part
from pipeline.model.blocks import BlockGraph
from pipeline.model.inputs import InputBatch
from pipeline.plan import LayerPlan, Plan
from pipeline.run.commits import committed_file
from pipeline.storage.object_store import ObjectStore
from pipeline.worker.model_state import ModelState
from quantizer.schemes import Float8Scheme, Int4Scheme, Int8Scheme

Pairs = Sequence[tuple[Any, NDArray[Any] | Array]]
"""A model's variables, each with its value."""

_TRACING = threading.RLock()

BatchValues = dict[int, Array]
"""What passes between the blocks for one batch, by number (see `pipeline.model.blocks`).

It stays on the device that computed it.
"""


class StreamedModel:
    """A model that runs part by part: embed → blocks → head, reading each part when it is due."""

    def __init__(
        self,
        graph: BlockGraph,
        read: Callable[[int], Pairs],
        *,
        compute_dtype: str,
        one_by_one: Collection[int] = (),
    ) -> None:
        """Args: read: gives the values of a part: 0 outside the blocks, i + 1 for block i.

        compute_dtype: of most layers.
        one_by_one: parts whose operations run one after another, uncompiled.
        """
        self.graph = graph
        self._read = read
        # On a CPU XLA keeps what lies between two operations in float32, where float16 would
        # overflow, and compiles no float16 attention. One by one they round as they do elsewhere.
        self._compiles = compute_dtype != "float16" or jax.default_backend() != "cpu"
        self._one_by_one = one_by_one
        self._programs: dict[tuple[str, int, bool], Any] = {}

    def embed(self, batches: Sequence[InputBatch]) -> list[BatchValues]:
        """What depends on no block, for each batch."""
        embed, numbers = self.graph.embed, self.graph.embedded
        run = self._load(0, "embed", embed)
        found = [run([batch.structured(embed)], {}) for batch in batches]
        return [_numbered(numbers, one) for one in found]

    def block(self, number: int) -> Pairs:
        """A block's variables and their values, on the device."""
        pairs = self._read(number + 1)
        return list(zip([v for v, _ in pairs], _placed(pairs), strict=True))

    def advance(self, call: int, states: Sequence[BatchValues], pairs: Pairs | None = None) -> None:
        """Send every batch through one call of a block and the glue before it, in place.

        Args:
            pairs: the block's variables with the values that they are to have; None to read them.
        """
        found = self.graph.calls[call]
        if found.glue is not None:
            run = self._load(0, f"glue {call}", found.glue.model)
            for state in states:
                results = run([[state[n] for n in found.glue.takes]], {})
                state.update(_numbered(found.glue.gives, results))
        # Calls of one signature list their variables in the same order, and share a program.
        run = self._load(found.block + 1, found.signature, found.layer, pairs)
        still_used = {*self.graph.head_takes, *found.gives}
        for later in self.graph.calls[call + 1 : call + 2]:
            still_used.update(later.live, later.glue.takes if later.glue else ())
        for state in states:
            args, kwargs = found.bind([state[number] for number in found.takes])
            state.update(_numbered(found.gives, found.given(run(list(args), kwargs))))
            for number in set(state) - still_used:
                del state[number]

    def head(self) -> Callable[[BatchValues, InputBatch], Array]:
        """The function (values, batch) → the model's output."""
        run = self._load(0, "head", self.graph.head)
        return lambda values, batch: run([self.graph.bind_head(values, batch.arrays)], {})

    def _load(
        self, part: int, name: str, layer: Any, pairs: Pairs | None = None
    ) -> Callable[[list[Any], dict[str, Any]], Any]:
        """Read a part; returns the function (args, kwargs) → a layer's output with its values."""
        pairs = self._read(part) if pairs is None else pairs
        compiled = self._compiles and part not in self._one_by_one
        key = (name, len(pairs), compiled)
        if key not in self._programs:
            variables = [variable for variable, _ in pairs]

            def call(values: Sequence[Array], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
                mapping = list(zip(variables, values, strict=True))
                # Keras must not trace a model in two threads, for two devices, at once.
                with _TRACING, keras.StatelessScope(state_mapping=mapping):
                    return layer(*args, **kwargs)

            self._programs[key] = jax.jit(call) if compiled else call
        return partial(self._programs[key], _placed(pairs))  # once for all batches


def _placed(pairs: Pairs) -> Sequence[Array]:
    """The values on the device, in their variables' dtypes."""
    placed: Sequence[Array] = jax.device_put(
        [
            value if isinstance(value, Array) else np.asarray(value, np.dtype(v.dtype))
            for v, value in pairs
        ]
    )
    return placed


def _numbered(numbers: Sequence[int], outputs: Any) -> BatchValues:
    # Keras unpacks a list of one.
    return dict(zip(numbers, map(jnp.asarray, tree.flatten(outputs)), strict=True))


def _rounds_inputs(layer: LayerPlan) -> bool:
    """Whether stock Keras rounds what the layer is given at run time."""
    if layer.experts:
        return False  # they are loaded as floats
    if isinstance(layer.scheme, Int8Scheme):
        return layer.scheme.quantize_activations
    if isinstance(layer.scheme, Int4Scheme):
        # A table of tokens that is the head too rounds to int8 (ReversibleEmbedding of 3.15).
        return layer.kind != "kernel"
    return isinstance(layer.scheme, Float8Scheme)


def _one_by_one(plan: Plan) -> frozenset[int]:
    """Which parts of an artifact must not be compiled, to give what `model(inputs)` gives."""
    rounding = {part.part for part in plan.parts if any(map(_rounds_inputs, part.layers))}
    # A block's rounding depends on the last bits of all that is before it; nothing comes after
    # the head.
    return frozenset(range(len(plan.parts)) if rounding - {0} else rounding)


def source_model(model: ModelState) -> StreamedModel:
    """The source, in its own dtype."""
    (skeleton, graph), _ = model.evaluation_models
    variables = {str(v.path): v for v in skeleton.model.variables}

    def read(part: int) -> Pairs:
        return [(variables[path], value) for path, value in model.read(part).items()]

    return StreamedModel(graph, read, compute_dtype=model.compute_dtype)


def artifact_model(
    model: ModelState, store: ObjectStore, file_of: Callable[[int], bytes] | None = None
) -> StreamedModel:
    """The artifact, from its committed files.

    Args:
        store: opened at its run's root.
        file_of: gives the file of each part, if they are not there.
    """
    file_of = file_of or partial(committed_file, store)
    _, (skeleton, graph) = model.evaluation_models
    skeleton.mark_calibrated()
    variables = {stored.name_path: stored.variable for stored in skeleton.stored}
    of_backbone = {id(variable) for variable in skeleton.backbone.variables}
    of_task = {str(v.path): v for v in skeleton.model.variables if id(v) not in of_backbone}

    def read(part: int) -> Pairs:
        values = decode_part(model.parts[part], file_of(part))
        pairs: list[tuple[Any, NDArray[Any] | Array]] = [
            (variables[name_path], value) for name_path, value in values.items()
        ]
        if part == 0 and of_task:
            source = model.read(0)
            pairs += [(v, source[path]) for path, v in of_task.items() if path in source]
        return pairs

    return StreamedModel(
        graph, read, compute_dtype=model.compute_dtype, one_by_one=_one_by_one(model.plan)
    )
