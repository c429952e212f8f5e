"""Compile what solving will run while there is nothing to solve yet."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from quantizer.factor import arrange, factorize_shifted
from quantizer.gptq import solve_slice
from quantizer.grid import find_grid
from quantizer.refine import damped_hessian, refine_slice
from quantizer.schemes import GPTQScheme
from quantizer.slices import row_slices


def compile_solver(
    out_features: int, in_features: int, scheme: GPTQScheme, *, scale_dtype: str
) -> None:
    """Compile the programs of `solve` for weights of this shape; nothing is computed.

    Args:
        scale_dtype: in which their scales will be stored.
    """
    size = in_features
    number = _floats()
    gram_CC = _floats(size, size)
    hessian_CC, order_C, dead_C, mean = _compiled(arrange, gram_CC, number, scheme.activation_order)
    panels, pivot_C = _compiled(factorize_shifted, hessian_CC, mean)
    if scheme.refinement_sweeps:
        damped = _compiled(damped_hessian, gram_CC, number, number)
    for height in sorted({b - a for a, b in row_slices(out_features, size)}):
        weight_CR = _floats(size, height)
        scale_GR, zero_GR = _compiled(
            find_grid,
            weight_CR,
            _floats(size, 1),
            weight_bits=scheme.weight_bits,
            group_size=scheme.group_size,
            symmetric=scheme.symmetric,
            search=scheme.scale_search,
            scale_dtype=scale_dtype,
        )
        group_C = jax.ShapeDtypeStruct((size,), jnp.int32)
        grid = (weight_CR, scale_GR, zero_GR, group_C)
        bits = scheme.weight_bits
        solved = _compiled(
            solve_slice, *grid, dead_C, order_C, panels, pivot_C, number, weight_bits=bits
        )
        if scheme.refinement_sweeps:
            sweeps = scheme.refinement_sweeps
            _compiled(
                refine_slice, solved, *grid, dead_C, damped, number, weight_bits=bits, sweeps=sweeps
            )


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _compiled(program: Any, *args: Any, **options: Any) -> Any:
    """Shapes and dtypes of what the program gives; JAX keeps it for the calls to come."""
    lowered = program.lower(*args, **options)
    lowered.compile()
    return lowered.out_info
