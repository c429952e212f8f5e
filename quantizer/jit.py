"""Compiled JAX functions that can also be compiled ahead of time, and their matrix product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


def program(**options: Any) -> Callable[[Callable[_Given, _Result]], Callable[_Given, _Result]]:
    """`jax.jit` with these options, for functions that may be compiled before they are needed.

    Called with `jax.ShapeDtypeStruct`s in place of arrays, the function is compiled for such
    arrays, nothing is computed, and the result holds shapes as well. A function that only calls
    programs, and reads no more than the shapes of their results, is therefore compiled ahead by
    calling it with shapes. The first array among the arguments decides.

    Whatever types JAX was told to prefer (`jax_enable_x64`, …), a program computes in its own.
    """

    def decorate(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
        compiled = jax.jit(function, **options)

        @wraps(function)
        def call(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
            with _default_types():
                if _is_shape(args[0]):
                    traced = compiled.trace(*args, **kwargs)
                    traced.lower().compile()  # JAX caches the executable for later calls
                    shapes: _Result = traced.out_info
                    return shapes
                result: _Result = compiled(*args, **kwargs)
                return result

        return call

    return decorate


_DEFAULT_TYPES = {
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
}


@contextmanager
def _default_types() -> Iterator[None]:
    """JAX's default rules of types for this block, in this thread."""
    if all(getattr(jax.config, name) == value for name, value in _DEFAULT_TYPES.items()):
        yield
        return
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


def _is_shape(argument: object) -> bool:
    while isinstance(argument, tuple) and argument:
        argument = argument[0]
    return isinstance(argument, jax.ShapeDtypeStruct)


def product(left: Array, right: Array) -> Array:
    """A matrix product in full float32: HIGHEST keeps TF32 out."""
    return jnp.matmul(left, right, precision=lax.Precision.HIGHEST)
