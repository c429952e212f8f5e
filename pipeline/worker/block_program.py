"""A block as compiled stages, cut at the inputs of its layers.

The block is traced once, with the values of its weights as arguments, so that all blocks of one
signature share the compiled programs. Stage k computes the input of the k-th group of layers; once
those are quantized, stage k + 1 continues with their new weights. So each layer runs just once, and
is calibrated on the input that it will have in the quantized model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax import Array
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from pipeline.errors import SourceError
from pipeline.model.blocks import Block
from pipeline.model.targets import Target, call_with, recorded_inputs
from pipeline.plan import InputGroup
from pipeline.recipe.recipe import StatisticsKind
from quantizer import kernel_layout


class BlockProgram:
    """One stage for the input of each group of layers, and one for the block's output.

    Attributes:
        groups: layers that share an input, in the order of their first calls.
        input_axes: of each group, the axes of the input that are contracted with the kernels,
            counted from its end.
        input_shapes: of each group, the other axes of the input: [batch, positions] for most.
        outputs: shapes and dtypes of what the block's call gives, for one micro-batch.
    """

    groups: tuple[InputGroup, ...]
    input_axes: tuple[tuple[int, ...], ...]
    input_shapes: tuple[tuple[int, ...], ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]

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
            SourceError: the block calls a target more than once.
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
        self._stages = _cut(traced, num_values=len(weights), num_outputs=num_outputs)

    def run_stage(
        self, stage: int, weights: Sequence[Any], live: tuple[Any, ...]
    ) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Run one stage on one micro-batch.

        Args:
            stage: up to the input of this group, or to what the block gives if there is none.
            weights: the block's, in the order of `layer.weights`.
            live: what the stage before left; for stage 0, what the block takes.

        Returns:
            the group's input alone or what the block gives, and `live` for the next stage.
        """
        program = self._stages[stage]
        found = program.run(*(weights[i] for i in program.reads), *live)
        return tuple(found[: program.num_results]), tuple(found[program.num_results :])

    def _trace(self, weights: Sequence[Array], inputs: Sequence[Array]) -> tuple[Array, ...]:
        """The input of each group, and what the block gives; sets `groups` and `input_axes`."""
        call = self._block.calls[0]
        args, kwargs = call.bind(inputs)
        calibrated = [t for t in self._block.targets if t.name in self._statistics]
        with recorded_inputs(calibrated) as recorded:
            output = call_with(self._block.layer, weights, *args, **kwargs)
        for name, calls in Counter(target.name for target, _ in recorded).items():
            if calls > 1:
                raise SourceError(
                    f"{self._block.name}/{name}: called more than once in its block, so it has no "
                    "single input to calibrate on; give it a scheme that needs no calibration, or "
                    "null"
                )
        # Layers that share an input, but not its axes or what they need to know, form two groups.
        members: dict[tuple[Any, ...], list[Target]] = {}
        tensors: dict[tuple[Any, ...], Array] = {}
        for target, tensor in recorded:
            axes = kernel_layout(target.layer).input_axes
            key = (id(tensor), axes, self._statistics[target.name])
            members.setdefault(key, []).append(target)
            tensors[key] = tensor
        self.groups = tuple(
            InputGroup(
                targets=tuple(target.name for target in targets),
                in_features=targets[0].in_features,
                statistics=statistics,
            )
            for (_, _, statistics), targets in members.items()
        )
        self.input_axes = tuple(axes for _, axes, _ in members)
        self.input_shapes = tuple(
            tuple(size for i, size in enumerate(tensor.shape) if i - tensor.ndim not in axes)
            for tensor, axes in zip(tensors.values(), self.input_axes, strict=True)
        )
        return (*tensors.values(), *call.given(output))


@dataclass(frozen=True)
class _Stage:
    """A range of a traced program's equations, compiled on its own.

    Attributes:
        run: (the values that it reads, live) → (*results, *live).
        reads: indices of these values among all of the program.
    """

    run: Any
    reads: list[int]
    num_results: int


def _cut(traced: ClosedJaxpr, *, num_values: int, num_outputs: int) -> tuple[_Stage, ...]:
    """Cut a traced program into one stage for each of its results, in their order.

    Args:
        traced: (values, *inputs) → results. A result may only be used by equations after it and
            after the results before it.
        num_values: how many of its arguments are values, passed to every stage anew.
        num_outputs: how many results the last stage has; the others have one each.
    """
    whole = traced.jaxpr
    values, inputs = whole.invars[:num_values], whole.invars[num_values:]
    stages = []
    live: list[Any] = list(inputs)
    start = 0
    first_output = len(whole.outvars) - num_outputs
    results = [*([v] for v in whole.outvars[:first_output]), whole.outvars[first_output:]]
    for index, (end, result) in enumerate(zip(_ends(whole, results), results, strict=True)):
        equations = whole.eqns[start:end]
        used = _used(equations, result)
        used_later = _used(whole.eqns[end:], [v for later in results[index + 1 :] for v in later])
        defined = [*live, *(v for equation in equations for v in equation.outvars)]
        left = [v for v in dict.fromkeys(defined) if v in used_later]
        reads = [i for i, value in enumerate(values) if value in used]
        constants = [
            (v, constant)
            for v, constant in zip(whole.constvars, traced.consts, strict=True)
            if v in used
        ]
        program = Jaxpr(
            constvars=[v for v, _ in constants],
            invars=[*(values[i] for i in reads), *live],
            outvars=[*result, *left],
            eqns=equations,
            effects=whole.effects,
            debug_info=whole.debug_info.with_unknown_names(),
        )
        closed = ClosedJaxpr(program, [constant for _, constant in constants])
        stages.append(_Stage(jax.jit(jaxpr_as_fun(closed)), reads, len(result)))
        live, start = left, end
    return tuple(stages)


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
