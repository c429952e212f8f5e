"""A block as compiled stages, cut at the inputs of its layers.

The block is traced once, with the values of its weights as arguments, so that all blocks of one
signature share the compiled programs. Stage k computes the input of the k-th group of layers; once
those are quantized, stage k + 1 continues with their new weights. So each layer runs just once, and
is calibrated on the input that it will have in the quantized model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import jax
from jax import Array
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from pipeline.errors import SourceError
from pipeline.model.blocks import Block
from pipeline.model.targets import Target, call_with, recorded_inputs
from pipeline.plan import InputGroup
from pipeline.recipe.recipe import StatisticsKind
from pipeline.worker.block_memory import BlockMemory, derived_values
from quantizer import kernel_layout


class BlockProgram:
    """One stage for the input of each group of layers, and one for the block's output.

    Attributes:
        groups: layers that share an input, or several if they are called several times, in the
            order of their first calls.
        input_axes: of each group, the axes of the inputs that are contracted with the kernels,
            counted from their ends.
        group_shapes: of each of a group's inputs, the other axes: [batch, positions] for most.
        outputs: shapes and dtypes of what the block's call gives, for one micro-batch.
        memory: what it needs device memory for.
    """

    groups: tuple[InputGroup, ...]
    input_axes: tuple[tuple[int, ...], ...]
    group_shapes: tuple[tuple[tuple[int, ...], ...], ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    memory: BlockMemory

    def __init__(
        self,
        block: Block,
        statistics: Mapping[str, StatisticsKind | None],
        inputs: Sequence[jax.ShapeDtypeStruct],
    ) -> None:
        """Trace the block, without computing anything.

        Args:
            statistics: what a target's scheme needs to know of its input, by the target's name.
            inputs: shapes and dtypes of what the block's call takes, for one micro-batch.

        Raises:
            SourceError: the block calls a target on what it has computed with that target.
        """
        self._block = block
        self._statistics = {name: kind for name, kind in statistics.items() if kind is not None}
        weights = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in block.layer.weights]
        traced = jax.make_jaxpr(self._trace)(weights, list(inputs))
        num_outputs = len(block.calls[0].outputs)
        self.outputs = tuple(
            jax.ShapeDtypeStruct(found.shape, found.dtype)
            for found in traced.out_avals[len(traced.out_avals) - num_outputs :]
        )
        self.memory = BlockMemory.of(traced.jaxpr)
        sizes = [*map(len, self.group_shapes), num_outputs]
        self._stages = _cut(traced, num_values=len(weights), sizes=sizes)
        self._refuse_loops(traced.jaxpr, sizes)

    @property
    def input_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of all groups' inputs."""
        return tuple(shape for shapes in self.group_shapes for shape in shapes)

    def run_stage(
        self, stage: int, weights: Sequence[Any], live: tuple[Any, ...]
    ) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Run one stage on one micro-batch.

        Args:
            stage: up to the inputs of this group, or to what the block gives if there is none.
            weights: the block's, in the order of `layer.weights`.
            live: what the stage before left; for stage 0, what the block takes.

        Returns:
            the group's inputs or what the block gives, and `live` for the next stage; of this what
            was live before is the very same arrays.
        """
        program = self._stages[stage]
        found = program.run(*(weights[i] for i in program.reads), *live)
        known = (*live, *found)
        return tuple(found[: program.num_results]), tuple(known[i] for i in program.leaves)

    def _trace(self, weights: Sequence[Array], inputs: Sequence[Array]) -> tuple[Array, ...]:
        """The inputs of each group, and what the block gives; sets the attributes."""
        call = self._block.calls[0]
        args, kwargs = call.bind(inputs)
        calibrated = [t for t in self._block.targets if t.name in self._statistics]
        with recorded_inputs(calibrated) as recorded:
            output = call_with(self._block.layer, weights, *args, **kwargs)
        targets_by_name = {target.name: target for target, _ in recorded}
        inputs_of: dict[str, list[Array]] = {}
        for target, tensor in recorded:
            inputs_of.setdefault(target.name, []).append(tensor)
        # Layers that share inputs, but not their axes or what they need to know, form two groups.
        members: dict[tuple[Any, ...], list[Target]] = {}
        tensors: dict[tuple[Any, ...], list[Array]] = {}
        for name, taken in inputs_of.items():
            axes = kernel_layout(targets_by_name[name].layer).input_axes
            key = (tuple(map(id, taken)), axes, self._statistics[name])
            members.setdefault(key, []).append(targets_by_name[name])
            tensors[key] = taken
        self.groups = tuple(
            InputGroup(
                targets=tuple(target.name for target in targets),
                in_features=targets[0].in_features,
                statistics=statistics,
            )
            for (_, _, statistics), targets in members.items()
        )
        self.input_axes = tuple(axes for _, axes, _ in members)
        self.group_shapes = tuple(
            tuple(
                tuple(size for i, size in enumerate(tensor.shape) if i - tensor.ndim not in axes)
                for tensor in taken
            )
            for taken, axes in zip(tensors.values(), self.input_axes, strict=True)
        )
        return (*(tensor for taken in tensors.values() for tensor in taken), *call.given(output))

    def _refuse_loops(self, whole: Jaxpr, sizes: Sequence[int]) -> None:
        """Check that no group's kernels are used before all of its inputs are known.

        Otherwise a stage would compute on with the float kernel, and calibrate the layer on what
        the quantized one never gives.
        """
        places = {str(variable.path): i for i, variable in enumerate(self._block.layer.weights)}
        by_name = {target.name: target for target in self._block.targets}
        ends = _ends(whole, _by_stage(whole, sizes))
        for group, end in zip(self.groups, ends, strict=False):
            for name in group.targets:
                kernel = whole.invars[places[by_name[name].kernel_path]]
                if kernel in _used(whole.eqns[:end], ()):
                    raise SourceError(
                        f"{self._block.name}/{name}: called again on what was computed with it, so "
                        "that it has no input to calibrate on; give it a scheme that needs no "
                        "calibration, or null"
                    )


@dataclass(frozen=True)
class _Stage:
    """A range of a traced program's equations, compiled on its own.

    Attributes:
        run: (the values that it reads, live) → (*results, what else it computes for later stages).
        reads: indices of these values among all of the program.
        leaves: indices among live and what `run` returns; a program's copies would take memory.
    """

    run: Any
    reads: list[int]
    leaves: list[int]
    num_results: int


def _cut(traced: ClosedJaxpr, *, num_values: int, sizes: Sequence[int]) -> tuple[_Stage, ...]:
    """Cut a traced program into stages that give its results, in their order.

    What a later stage needs is kept for it, or computed there again (see `derived_values`).

    Args:
        traced: (values, *inputs) → results. A result may only be used by equations after it and
            after the results before it.
        num_values: how many of its arguments are values, passed to every stage anew.
        sizes: how many results each stage gives.
    """
    whole = traced.jaxpr
    values, inputs = whole.invars[:num_values], whole.invars[num_values:]
    derived = derived_values(whole, inputs)
    stages = []
    live: list[Any] = list(inputs)
    start = 0
    results = _by_stage(whole, sizes)
    for index, (end, result) in enumerate(zip(_ends(whole, results), results, strict=True)):
        equations = whole.eqns[start:end]
        again = [derived[v].equations for v in _used(equations, result) if v in derived]
        missing = sorted(i for i in frozenset().union(*again) if i < start)
        repeated = [x for x in map(whole.eqns.__getitem__, missing) if set(x.outvars) - set(live)]
        equations = [*repeated, *equations]
        used = _used(equations, result)
        used_later = _used(whole.eqns[end:], [v for later in results[index + 1 :] for v in later])
        kept = used_later - derived.keys()
        kept |= {v for made in used_later & derived.keys() for v in derived[made].inputs}
        defined = [*live, *(v for equation in equations for v in equation.outvars)]
        left = [v for v in dict.fromkeys(defined) if v in kept]
        new = [v for v in left if v not in live and v not in result]
        known = [*live, *result, *new]
        reads = [i for i, value in enumerate(values) if value in used]
        constants = [
            (v, constant)
            for v, constant in zip(whole.constvars, traced.consts, strict=True)
            if v in used
        ]
        program = Jaxpr(
            constvars=[v for v, _ in constants],
            invars=[*(values[i] for i in reads), *live],
            outvars=[*result, *new],
            eqns=equations,
            effects=whole.effects,
            debug_info=whole.debug_info.with_unknown_names(),
        )
        closed = ClosedJaxpr(program, [constant for _, constant in constants])
        leaves = [known.index(v) for v in left]
        stages.append(_Stage(jax.jit(jaxpr_as_fun(closed)), reads, leaves, len(result)))
        live, start = left, end
    return tuple(stages)


def _by_stage(program: Jaxpr, sizes: Sequence[int]) -> list[list[Any]]:
    """A program's results, by stage."""
    results = iter(program.outvars)
    return [list(islice(results, size)) for size in sizes]


def _ends(program: Jaxpr, results: Sequence[Sequence[Any]]) -> list[int]:
    """The number of equations up to each stage's results; all of them for the last."""
    defined_by = {v: i + 1 for i, equation in enumerate(program.eqns) for v in equation.outvars}
    ends: list[int] = []
    for result in results:
        numbers = [0 if isinstance(v, Literal) else defined_by.get(v, 0) for v in result]
        ends.append(max([*numbers, *ends[-1:]]))
    ends[-1] = len(program.eqns)
    return ends


def _used(equations: Sequence[Any], results: Sequence[Any]) -> set[Any]:
    """The variables that equations and results use."""
    used = [*(v for equation in equations for v in equation.invars), *results]
    return {v for v in used if not isinstance(v, Literal)}
