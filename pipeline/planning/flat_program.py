"""A traced function as one list of operations: calls are replaced by what they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# Primitives that only call a function, whose derivative may be special.
_CALLS = (
    "jit",
    "closed_call",
    "core_call",
    "remat2",
    "checkpoint",
    "custom_jvp_call",
    "custom_vjp_call",
)


@dataclass(frozen=True)
class Operation:
    """One operation on values, which are numbers of a `FlatProgram`.

    Attributes:
        name: of JAX's primitive.
    """

    name: str
    params: Mapping[str, Any]
    takes: tuple[int, ...]
    gives: tuple[int, ...]


@dataclass(frozen=True)
class FlatProgram:
    """A function whose every operation is used.

    Attributes:
        shapes: of each value.
        numbers: values that are a known number.
        arguments, results: the values that it takes and gives.
    """

    operations: tuple[Operation, ...]
    shapes: tuple[tuple[int, ...], ...]
    numbers: Mapping[int, float]
    arguments: tuple[int, ...]
    results: tuple[int, ...]

    @cached_property
    def makers(self) -> Mapping[int, int]:
        """Which operation gives a value."""
        return {v: i for i, operation in enumerate(self.operations) for v in operation.gives}

    @cached_property
    def users(self) -> Mapping[int, Sequence[tuple[int, int]]]:
        """The operations that take a value, and at which position."""
        found: dict[int, list[tuple[int, int]]] = {}
        for index, operation in enumerate(self.operations):
            for position, value in enumerate(operation.takes):
                found.setdefault(value, []).append((index, position))
        return found


def flat_program(traced: ClosedJaxpr) -> FlatProgram:
    """Flatten what `jax.make_jaxpr` gives."""
    made = _Flattening()
    arguments = tuple(made.value(variable.aval.shape) for variable in traced.jaxpr.invars)
    results = made.add(traced.jaxpr, traced.consts, arguments)
    needed, kept = set(results), []
    for operation in reversed(made.operations):
        if needed.intersection(operation.gives):
            needed.update(operation.takes)
            kept.append(operation)
    return FlatProgram(tuple(reversed(kept)), tuple(made.shapes), made.numbers, arguments, results)


class _Flattening:
    """A program as far as it has been flattened."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.shapes: list[tuple[int, ...]] = []
        self.numbers: dict[int, float] = {}

    def value(self, shape: Sequence[int], known: Any = None) -> int:
        """A new value; `known` is its content, if that is a constant."""
        self.shapes.append(tuple(int(size) for size in shape))
        if known is not None and np.ndim(known) == 0:
            self.numbers[len(self.shapes) - 1] = float(known)
        return len(self.shapes) - 1

    def add(
        self, program: Jaxpr, constants: Sequence[Any], given: Sequence[int]
    ) -> tuple[int, ...]:
        """Add a program's operations; returns its results."""
        values: dict[Any, int] = dict(zip(program.invars, given, strict=True))
        for variable, constant in zip(program.constvars, constants, strict=True):
            values[variable] = self.value(np.shape(constant), constant)

        def read(atom: Any) -> int:
            return (
                self.value(np.shape(atom.val), atom.val)
                if isinstance(atom, Literal)
                else values[atom]
            )

        for equation in program.eqns:
            takes = tuple(map(read, equation.invars))
            name = equation.primitive.name
            inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
            if name in _CALLS and isinstance(inner, Jaxpr | ClosedJaxpr):
                closed = inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())
                gives = self.add(closed.jaxpr, closed.consts, takes)
            else:
                gives = tuple(self.value(getattr(v.aval, "shape", ())) for v in equation.outvars)
                self.operations.append(Operation(name, equation.params, takes, gives))
            values.update(zip(equation.outvars, gives, strict=True))
        return tuple(map(read, program.outvars))
