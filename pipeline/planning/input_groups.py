"""Trace a model's blocks without computing: which layers share an input, which are not called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pipeline.calibration.windows import TokenWindows
from pipeline.errors import RecipeError, SourceError
from pipeline.model.blocks import Block, BlockGraph, Call, Glue
from pipeline.model.inputs import InputLayout
from pipeline.model.preset import keras_errors
from pipeline.model.targets import call_with, outputs_with, recorded_inputs
from pipeline.plan import InputGroup, LayerPlan
from pipeline.recipe.recipe import statistics_of
from pipeline.worker.block_memory import BlockMemory
from pipeline.worker.block_program import BlockProgram

Shapes = dict[int, Any]
"""Shapes and dtypes of values, by number (see `pipeline.model.blocks`)."""

# Of inputs that are not text: frames, and samples of sound, of which a model needs many.
_ANY_LENGTHS = (16, 4096)


def input_groups(
    graph: BlockGraph,
    layout: InputLayout,
    layers: Sequence[Sequence[LayerPlan]],
    windows: TokenWindows,
    micro_batch: int,
) -> tuple[list[tuple[InputGroup, ...]], BlockMemory]:
    """The input groups of every block, given the layers of each, and what any block needs.

    Raises:
        PipelineError: the model cannot take the windows, or a layer cannot be calibrated.
    """
    batch = layout.batch(windows, slice(0, micro_batch), micro_batch)
    values = embedded_shapes(graph, layout, windows, micro_batch)
    # Blocks of one signature, schemes and inputs have the same groups.
    programs: dict[tuple[Any, ...], BlockProgram] = {}
    found, memory = [], BlockMemory()
    for call, planned in zip(graph.calls, layers, strict=True):
        taken = taken_by(call, values)
        statistics = {layer.name: statistics_of(layer.scheme) for layer in planned}
        key = (call.signature, tuple(statistics.items()), taken)
        if key not in programs:
            program = programs[key] = BlockProgram(graph.blocks[call.block], statistics, taken)
            for shape in program.input_shapes:
                batch.rows(shape)  # refuses layers whose padding cannot be told
            _check_all_called(graph.blocks[call.block], statistics, program)
            memory = memory.most(program.memory)
        found.append(programs[key].groups)
        values |= zip(call.gives, programs[key].outputs, strict=True)
    return found, memory


def kernels_read_apart(graph: BlockGraph, layout: InputLayout) -> frozenset[str]:
    """Paths of the layers in blocks that no block calls, but whose kernels it may read itself.

    Such as the feed-forward layers of KerasHub's Gemma4: stock Keras would compute with the codes
    as if they were weights.
    """
    values = _any_shapes(graph, layout)
    traced: dict[tuple[Any, ...], tuple[set[str], list[Any]]] = {}
    found: set[str] = set()
    for call in graph.calls:
        block, taken = graph.blocks[call.block], taken_by(call, values)
        # Keras numbers some names.
        key = (call.signature, taken, tuple(target.name for target in block.targets))
        if key not in traced:
            traced[key] = _called(block, call, taken)
        called, given = traced[key]
        found.update(target.path for target in block.targets if target.name not in called)
        values |= zip(call.gives, given, strict=True)
    return frozenset(found)


def _any_shapes(graph: BlockGraph, layout: InputLayout) -> Shapes:
    """As `embedded_shapes`, for inputs of any size: what a block calls does not depend on it."""
    missing = [] if layout.encoders else layout.missing(())
    for length in _ANY_LENGTHS:
        shapes = {n: [size or length for size in layout.inputs[n].shape] for n in missing}
        windows = TokenWindows(
            tokens=np.zeros((1, _ANY_LENGTHS[0]), np.int32),
            lengths=np.full(1, _ANY_LENGTHS[0], np.int32),
            fingerprint="",
            num_documents=0,
            decoder_start=(0,) if layout.takes_two_texts else (),
            inputs={n: np.zeros((1, *shapes[n]), layout.inputs[n].dtype) for n in missing},
        )
        try:
            return embedded_shapes(graph, layout, windows, 1)
        except SourceError:
            if not missing or length == _ANY_LENGTHS[-1]:
                raise
    raise AssertionError("a length was returned or raised for")


def embedded_shapes(
    graph: BlockGraph, layout: InputLayout, windows: TokenWindows, size: int
) -> Shapes:
    """What depends on no block, for the first windows.

    Raises:
        SourceError: the model cannot take them.
    """
    batch = layout.batch(windows, slice(0, size), size)
    inputs = batch.structured(graph.embed)
    weights = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in graph.embed.weights]
    shapes = ", ".join(f"{name} {list(batch.arrays[name].shape[1:])}" for name in layout.inputs)
    problem = f"{layout.name}: the model cannot take inputs of the shapes {shapes}"
    with keras_errors(problem, "give arrays as the model's own preprocessor makes them"):
        embedded = jax.eval_shape(lambda values: outputs_with(graph.embed, values, inputs), weights)
    return dict(zip(graph.embedded, embedded, strict=True))


def taken_by(call: Call, values: Shapes) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What a call takes, once the glue before it has run, whose values are added."""
    if call.glue is not None:
        values |= _given_by(call.glue, values)
    return tuple(jax.ShapeDtypeStruct(values[n].shape, values[n].dtype) for n in call.takes)


def _given_by(glue: Glue, values: Mapping[int, Any]) -> Shapes:
    weights = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in glue.model.weights]
    taken = [values[number] for number in glue.takes]
    given = jax.eval_shape(lambda *args: outputs_with(glue.model, *args), weights, taken)
    return dict(zip(glue.gives, given, strict=True))


def _called(
    block: Block, call: Call, taken: Sequence[jax.ShapeDtypeStruct]
) -> tuple[set[str], list[Any]]:
    """Names of the targets that a block calls, and what it gives."""

    def run(weights: Any, values: Any) -> list[Any]:
        args, kwargs = call.bind(values)
        return list(call.given(call_with(block.layer, weights, *args, **kwargs)))

    weights = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in block.layer.weights]
    with recorded_inputs(block.targets) as recorded:
        given = jax.eval_shape(run, weights, list(taken))
    return {target.name for target, _ in recorded}, given


def _check_all_called(block: Block, statistics: Mapping[str, Any], program: BlockProgram) -> None:
    called = {name for group in program.groups for name in group.targets}
    missing = [name for name, kind in statistics.items() if kind and name not in called]
    if missing:
        raise RecipeError(
            f"{block.name}/{missing[0]}: its block does not call it with these inputs, so it "
            "cannot be calibrated; give it null, or a scheme that needs no calibration"
        )
