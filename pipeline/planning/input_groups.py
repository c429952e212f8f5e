"""Trace a model's blocks without computing: what shares an input, what blocks do with kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from pipeline.calibration.windows import TokenWindows
from pipeline.errors import RecipeError, SourceError
from pipeline.model.blocks import Block, BlockGraph
from pipeline.model.call_shapes import Shapes, taken_by
from pipeline.model.inputs import InputBatch, InputLayout
from pipeline.model.preset import keras_errors
from pipeline.model.targets import outputs_with
from pipeline.plan import InputGroup, LayerPlan
from pipeline.recipe.recipe import StatisticsKind, statistics_of
from pipeline.worker.block_memory import BlockMemory
from pipeline.worker.block_program import BlockProgram, hidden_states, trace_block
from pipeline.worker.expert_products import expert_products

# Of inputs that are not text: frames, and samples of sound, of which a model needs many.
_ANY_LENGTHS = (16, 4096)


def input_groups(
    graph: BlockGraph,
    layout: InputLayout,
    layers: Sequence[Sequence[LayerPlan]],
    windows: TokenWindows,
    micro_batch: int,
    *,
    tuned: bool = False,
    of_all: bool = False,
) -> tuple[list[tuple[InputGroup, ...]], BlockMemory]:
    """The input groups of every block, given the layers of each, and what any block needs.

    Args:
        tuned: whether blocks are to be trained, and judged by what they give.
        of_all: take the Grams of all kernels that a block calls, but of experts, whatever the
            schemes of its layers.

    Raises:
        PipelineError: the model cannot take the windows, or a layer cannot be calibrated.
    """
    batch = layout.batch(windows, slice(0, micro_batch), micro_batch)
    values = embedded_shapes(graph, layout, windows, micro_batch)
    # Blocks of one signature, schemes and inputs have the same groups.
    programs: dict[tuple[Any, ...], BlockProgram] = {}
    found, memory = [], BlockMemory()
    for call, planned in zip(graph.calls, layers, strict=True):
        block, taken = graph.blocks[call.block], taken_by(call, values)
        statistics = {
            layer.name: _any_statistics(layer) if of_all else statistics_of(layer.scheme)
            for layer in planned
        }
        # By their order: Keras numbers some names.
        kinds = tuple(statistics[target.name] for target in block.targets)
        key = (call.signature, kinds, taken)
        if key not in programs:
            program = programs[key] = BlockProgram(block, statistics, taken)
            for shape in program.input_shapes:
                batch.rows(shape)  # refuses layers whose padding cannot be told
            if not of_all:
                _check_all_called(block, statistics, program)
            if tuned:
                _check_judged(block, program.outputs, batch)
            memory = memory.most(program.memory)
        found.append(programs[key].groups_of(block))
        values |= zip(call.gives, programs[key].outputs, strict=True)
    return found, memory


def _any_statistics(layer: LayerPlan) -> StatisticsKind | None:
    """What any scheme may need to know of a layer's input."""
    return "hessian" if layer.kind == "kernel" and not layer.experts else None


@dataclass(frozen=True)
class ExpertUse:
    """How a block uses a bank of experts.

    Attributes:
        own_inputs: whether each expert reads rows of its own.
        experts_per_token: to how many experts the block sends each token; 0 if that is not known.
    """

    own_inputs: bool
    experts_per_token: int


@dataclass(frozen=True)
class BlockUses:
    """What blocks do with the kernels in them.

    Attributes:
        apart: paths of the layers that no block calls, but whose kernels it may read itself, such
            as the feed-forward layers of KerasHub's Gemma4: stock Keras would compute with the
            codes as if they were weights.
        experts: of the banks that blocks use as such, by path.
    """

    apart: frozenset[str]
    experts: Mapping[str, ExpertUse]


def block_uses(graph: BlockGraph, layout: InputLayout) -> BlockUses:
    """Trace every kind of block once."""
    values = _any_shapes(graph, layout)
    traced: dict[tuple[Any, ...], _Traced] = {}
    apart: set[str] = set()
    experts: dict[str, ExpertUse] = {}
    for call in graph.calls:
        block, taken = graph.blocks[call.block], taken_by(call, values)
        key = (call.signature, taken)
        if key not in traced:
            traced[key] = _Traced.of(block, taken)
        found = traced[key]
        for index, target in enumerate(block.targets):
            if index in found.experts:
                experts[target.path] = found.experts[index]
            elif index not in found.called and not target.num_experts:
                apart.add(target.path)
        values |= zip(call.gives, found.gives, strict=True)
    return BlockUses(frozenset(apart), experts)


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


@dataclass(frozen=True)
class _Traced:
    """One kind of block.

    Attributes:
        called: which of its targets it calls, by their position.
        experts: of those that it uses as banks of experts.
        gives: shapes and dtypes.
    """

    called: frozenset[int]
    experts: Mapping[int, ExpertUse]
    gives: Sequence[jax.ShapeDtypeStruct]

    @classmethod
    def of(cls, block: Block, taken: Sequence[jax.ShapeDtypeStruct]) -> _Traced:
        traced, called = trace_block(block, taken, block.targets)
        program = traced.jaxpr
        weights = {str(v.path): i for i, v in enumerate(block.layer.weights)}
        banks = {
            program.invars[weights[target.kernel_path]]: index
            for index, target in enumerate(block.targets)
            if target.num_experts
        }
        return cls(
            called=frozenset(i for i, target in enumerate(block.targets) if target.name in called),
            experts={
                banks[bank]: ExpertUse(product.choice is not None, product.experts_per_row)
                for bank, product in expert_products(program, banks).items()
            },
            gives=[
                jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)
                for v in program.outvars[len(called) :]
            ],
        )


def _check_judged(block: Block, given: Sequence[jax.ShapeDtypeStruct], batch: InputBatch) -> None:
    places = hidden_states(given)
    if not places:
        shapes = ", ".join(str(list(one.shape)) for one in given)
        raise RecipeError(
            f"{block.name}: it gives arrays of the shapes {shapes}, and no hidden states [batch, "
            "positions, features] to train it by; leave tuning out of the recipe"
        )
    for place in places:
        batch.rows(given[place].shape[:2])


def _check_all_called(block: Block, statistics: Mapping[str, Any], program: BlockProgram) -> None:
    called = {name for group in program.groups for name in group.targets}
    missing = [name for name, kind in statistics.items() if kind and name not in called]
    if missing:
        raise RecipeError(
            f"{block.name}/{missing[0]}: its block does not call it with these inputs, so it "
            "cannot be calibrated; give it null, or a scheme that needs no calibration"
        )
