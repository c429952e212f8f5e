"""Compiled functions that can be compiled ahead, by calling them with shapes in place of arrays."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import jax

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


def program(**options: Any) -> Callable[[Callable[_Given, _Result]], Callable[_Given, _Result]]:
    """`jax.jit` with these options, and what it compiles may be compiled ahead.

    Where the first array is a `jax.ShapeDtypeStruct`, the function is compiled for such arrays,
    nothing is computed, and the result holds shapes, too. So whatever calls programs alone, and
    reads no more than the shapes of what they give, is compiled ahead by calling it.
    """

    def decorate(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
        compiled = jax.jit(function, **options)

        @wraps(function)
        def call(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
            if _is_shape(args[0]):
                traced = compiled.trace(*args, **kwargs)
                traced.lower().compile()  # JAX keeps it for the calls to come
                shapes: _Result = traced.out_info
                return shapes
            result: _Result = compiled(*args, **kwargs)
            return result

        return call

    return decorate


def _is_shape(argument: object) -> bool:
    while isinstance(argument, tuple) and argument:
        argument = argument[0]
    return isinstance(argument, jax.ShapeDtypeStruct)
