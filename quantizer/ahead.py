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
    number = _shape()
    gram_CC = _shape(size, size)
    hessian_CC, order_C, dead_C, mean = arrange(gram_CC, number, scheme.activation_order)
    panels, pivot_C = factorize_shifted(hessian_CC, mean)
    if scheme.refinement_sweeps:
        damped = damped_hessian(gram_CC, number, number)
    for height in sorted({b - a for a, b in row_slices(out_features, size)}):
        weight_CR = _shape(size, height)
        scale_GR, zero_GR = find_grid(
            weight_CR,
            _shape(size, 1),
            weight_bits=scheme.weight_bits,
            group_size=scheme.group_size,
            symmetric=scheme.symmetric,
            search=scheme.scale_search,
            scale_dtype=scale_dtype,
        )
        grid = (weight_CR, scale_GR, zero_GR, _shape(size, dtype=jnp.int32))
        bits = scheme.weight_bits
        solved = solve_slice(*grid, dead_C, order_C, panels, pivot_C, number, weight_bits=bits)
        if scheme.refinement_sweeps:
            sweeps = scheme.refinement_sweeps
            refine_slice(solved, *grid, dead_C, damped, number, weight_bits=bits, sweeps=sweeps)


def _shape(*shape: int, dtype: Any = jnp.float32) -> Any:
    """What a program takes for an array, to be compiled."""
    return jax.ShapeDtypeStruct(shape, dtype)
