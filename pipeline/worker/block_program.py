"""A block, cut at the inputs of its layers, so that each layer is calibrated on quantized ones.

The block is traced once with the values of its variables as arguments; blocks of one kind share
what was compiled. While it is traced, the target layers' `call` notes its input: there the
traced program is cut. Stage k computes up to the input of the k-th group of layers; once those
are quantized, stage k + 1 goes on with their new weights. So every layer runs just once, and sees
what it will see in the quantized model.

Cut a traced JAX program into stages that run one after the other, each compiled on its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax import Array
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from pipeline.errors import SourceError
from pipeline.model.blocks import Block
from pipeline.model.stateless import call_with, recorded_inputs
from pipeline.recipe.recipe import StatisticsKind
from quantizer import kernel_layout


@dataclass(frozen=True, kw_only=True)
class InputGroup:
    """Target layers that are fed the same tensor: one sum and one factorization serve all.

    Attributes:
        targets: their names within the block, in the order of their calls.
        in_features: C.
        input_axes: the axes of the tensor that are summed with the kernels, from its end.
        statistics: what their schemes need to know of it.
    """

    targets: tuple[str, ...]
    in_features: int
    input_axes: tuple[int, ...]
    statistics: StatisticsKind


class BlockProgram:
    """A block's kind as stages: one to the input of each group, and one to the block's output."""

    def __init__(
        self,
        block: Block,
        statistics: Mapping[str, StatisticsKind | None],
        hidden_states: jax.ShapeDtypeStruct,
        side_inputs: Sequence[jax.ShapeDtypeStruct],
    ) -> None:
        """Trace the block; nothing is computed.

        Args:
            block: any block of the kind.
            statistics: what to know of a target's input, by its name; None or absent for nothing.
            hidden_states, side_inputs: shapes and dtypes of one micro-batch.

        Raises:
            SourceError: a target that the block calls more than once.
        """
        self._block = block
        self._wanted = {
            target.name: target for target in block.targets if statistics.get(target.name)
        }
        self._statistics = statistics
        self.groups: tuple[InputGroup, ...] = ()
        values = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in block.layer.weights]
        traced = jax.make_jaxpr(self._trace)(values, hidden_states, list(side_inputs))
        stages = cut(traced, num_values=len(values))
        self._stages: tuple[Stage, ...] = stages

    def start(self, hidden_states: Any, side_inputs: Sequence[Any]) -> tuple[Any, ...]:
        """What stage 0 begins with."""
        return (hidden_states, *side_inputs)

    def advance(
        self, stage: int, values: Sequence[Any], live: tuple[Any, ...]
    ) -> tuple[Array, tuple[Array, ...]]:
        """Run one stage on one micro-batch.

        Args:
            stage: below `len(groups)`, up to the input of that group; else, to the end.
            values: of the block's weights, in the order of `layer.weights`.
            live: from `start`, or from the stage before.

        Returns:
            the group's input, or the block's output; and what the next stage begins with.
        """
        return self._stages[stage](values, live)

    def _trace(
        self, values: Sequence[Array], hidden_states: Array, side_inputs: Sequence[Array]
    ) -> tuple[Array, ...]:
        """The inputs of the groups, in the order of their first calls, and the output."""
        args, kwargs = self._block.bind(hidden_states, side_inputs)
        with recorded_inputs(self._wanted.values()) as seen:
            output = call_with(self._block.layer, values, *args, **kwargs)
        names = [target.name for target, _ in seen]
        for name in names:
            if names.count(name) > 1:
                raise SourceError(
                    f"{self._block.name}/{name}: called more than once in its block, so it has no "
                    "input of its own; give it a scheme that needs no calibration, or null"
                )
        grouped: list[tuple[list[str], Array, tuple[int, ...], StatisticsKind]] = []
        for target, tensor in seen:
            axes = kernel_layout(target.layer).input_axes
            wanted = self._statistics[target.name]
            assert wanted is not None
            for members, other, *rest in grouped:
                # Layers of one input that need to know other things of it are two groups.
                if other is tensor and rest == [axes, wanted]:
                    members.append(target.name)
                    break
            else:
                grouped.append(([target.name], tensor, axes, wanted))
        self.groups = tuple(
            InputGroup(
                targets=tuple(members),
                in_features=self._wanted[members[0]].in_features,
                input_axes=axes,
                statistics=wanted,
            )
            for members, _, axes, wanted in grouped
        )
        return (*(tensor for _, tensor, _, _ in grouped), output)


class Stage:
    """Some equations of a program: from what the stage before left to what later ones need."""

    def __init__(self, program: Jaxpr, constants: Sequence[Any], *, reads: Sequence[int]) -> None:
        """Compile nothing yet.

        Args:
            program: of (constants, values that it reads, live) → (result, *left).
            constants: arrays, in the order of `program.constvars`.
            reads: which of the values it reads.
        """
        self._reads = tuple(reads)
        self._run = jax.jit(jaxpr_as_fun(ClosedJaxpr(program, list(constants))))

    def __call__(
        self, values: Sequence[Any], live: Sequence[Any]
    ) -> tuple[Array, tuple[Array, ...]]:
        """The stage's result, and what the next one begins with.

        Args:
            values: all that the whole program takes.
            live: its inputs, or what the stage before left.
        """
        result, *left = self._run(*(values[i] for i in self._reads), *live)
        return result, tuple(left)


def cut(traced: ClosedJaxpr, *, num_values: int) -> tuple[Stage, ...]:
    """A stage for each of a program's results, in their order.

    Args:
        traced: of (values, *inputs) → results. What uses a result must come after it, and after
            those before it.
        num_values: how many of its arguments are values, given anew to every stage.
    """
    whole = traced.jaxpr
    values, inputs = whole.invars[:num_values], whole.invars[num_values:]
    ends = _ends(whole)
    stages = []
    live: list[Any] = list(inputs)
    start = 0
    for index, (end, result) in enumerate(zip(ends, whole.outvars, strict=True)):
        equations = whole.eqns[start:end]
        read = _read(equations, [result])
        later = _read(whole.eqns[end:], whole.outvars[index + 1 :])
        there = [*live, *(v for equation in equations for v in equation.outvars)]
        left = [v for v in dict.fromkeys(there) if v in later]
        reads = [i for i, value in enumerate(values) if value in read]
        constants = [
            (v, constant)
            for v, constant in zip(whole.constvars, traced.consts, strict=True)
            if v in read
        ]
        program = Jaxpr(
            constvars=[v for v, _ in constants],
            invars=[*(values[i] for i in reads), *live],
            outvars=[result, *left],
            eqns=equations,
            effects=whole.effects,
            debug_info=whole.debug_info.with_unknown_names(),
        )
        stages.append(Stage(program, [constant for _, constant in constants], reads=reads))
        live, start = left, end
    return tuple(stages)


def _ends(program: Jaxpr) -> list[int]:
    """The number of equations up to each result; all of them for the last."""
    defined_by = {v: i + 1 for i, equation in enumerate(program.eqns) for v in equation.outvars}
    ends: list[int] = []
    for result in program.outvars:
        number = 0 if isinstance(result, Literal) else defined_by.get(result, 0)
        ends.append(max(number, ends[-1] if ends else 0))
    ends[-1] = len(program.eqns)
    return ends


def _read(equations: Sequence[Any], results: Sequence[Any]) -> set[Any]:
    """What equations and results need of before."""
    used = [*(v for equation in equations for v in equation.invars), *results]
    return {v for v in used if not isinstance(v, Literal)}
