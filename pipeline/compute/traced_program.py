"""Cut a traced JAX program into stages that run one after the other, each compiled on its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax import Array
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun


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
