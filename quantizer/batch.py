"""Many GPTQ problems of one shape solved as one program: small layers that fill no device alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from quantizer.errors import CalibrationError, WeightError
from quantizer.factor import SMALLEST_PIVOT, arrange, factorize_shifted
from quantizer.gptq import SolvedSlice, solve_slice
from quantizer.grid import find_grid
from quantizer.hessian import HessianSum
from quantizer.schemes import GPTQScheme
from quantizer.slices import contiguous_groups, gptq_account, row_slices, transposed
from quantizer.solution import GroupedWeight, Solution
from quantizer.solver import (
    check_scale_dtype,
    check_scheme,
    check_weight,
    require_hessian,
    solve,
)

_factorize = jax.jit(jax.vmap(factorize_shifted))


@partial(jax.jit, static_argnames="weight_bits")
def _solve(*operands: Any, weight_bits: int) -> SolvedSlice:
    """`solve_slice` of each problem; they share their groups."""
    one = partial(solve_slice, weight_bits=weight_bits)
    solved: SolvedSlice = jax.vmap(one, in_axes=(0, 0, 0, None, *[0] * 5))(*operands)
    return solved


def solve_batch(
    weights: Sequence[ArrayLike],
    hessians: Sequence[HessianSum],
    scheme: GPTQScheme,
    *,
    scale_dtype: str = "float32",
    names: Sequence[str] | None = None,
) -> list[Solution]:
    """Quantize weights of one shape, each under its own Hessian, together.

    A problem whose Hessian needs more damping than the scheme's is solved again alone, so one
    bad layer costs the others nothing. Products of another shape round otherwise: the results
    are as good as `solve`'s, and repeatable, but not its bits.

    Args:
        weights: P matrices [out_features, in_features] of one shape.
        hessians: what calibration saw of each one's inputs.

    Raises:
        QuantizationError: as `quantizer.solve`; WeightError when the shapes differ.
    """
    names = [f"weight {i}" for i in range(len(weights))] if names is None else names
    checked = [check_weight(w, n) for w, n in zip(weights, names, strict=True)]
    if len({weight_RC.shape for weight_RC in checked}) > 1:
        raise WeightError(
            f"{names[0]} …: a batch needs weights of one shape, got "
            f"{sorted({weight_RC.shape for weight_RC in checked})}; solve them one by one"
        )
    if not checked:
        return []
    if scheme.drift_correction:
        raise CalibrationError(
            f"{names[0]} …: a batch corrects no drift; set drift_correction to 0, or use solve"
        )
    if scheme.refinement_sweeps:
        raise CalibrationError(
            f"{names[0]} …: a batch refines nothing; set refinement_sweeps to 0, or use solve"
        )
    num_outputs, num_inputs = checked[0].shape
    for hessian, name in zip(hessians, names, strict=True):
        require_hessian(hessian, num_inputs, scheme.mode, name)
    for weight_RC, name in zip(checked, names, strict=True):
        check_scheme(scheme, num_inputs, name)
        check_scale_dtype(scale_dtype, weight_RC, scheme, name)

    ordered = jax.vmap(partial(arrange, activation_order=scheme.activation_order))
    hessian_PCC, order_PC, dead_PC, mean_P = ordered(
        jnp.stack([jnp.asarray(h.gram_CC) for h in hessians]),
        jnp.asarray([h.num_rows for h in hessians], jnp.float32),
    )
    shift_P = scheme.hessian_damping * mean_P
    panels, pivot_PC = _factorize(hessian_PCC, shift_P)
    solvable_P = np.asarray(jnp.min(pivot_PC, axis=1) >= SMALLEST_PIVOT * mean_P)

    place_PC = jnp.argsort(order_PC, axis=1)[:, :num_inputs]
    energy_PC = jnp.where(dead_PC, 0.0, jnp.take_along_axis(pivot_PC, place_PC, axis=1))
    group_C = contiguous_groups(num_inputs, scheme.group_size)
    grid = partial(
        find_grid,
        weight_bits=scheme.weight_bits,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        search=scheme.scale_search,
        scale_dtype=scale_dtype,
    )
    parts = []
    for a, b in row_slices(num_outputs, num_inputs):
        weight_PCR = jnp.stack([jnp.asarray(weight_RC[a:b].T) for weight_RC in checked])
        live_PCR = jnp.where(dead_PC[:, :, None], 0.0, weight_PCR)
        scale_PGR, zero_PGR = jax.vmap(grid)(live_PCR, energy_PC[:, :, None])
        solved = _solve(
            weight_PCR, scale_PGR, zero_PGR, jnp.asarray(group_C), ~dead_PC, order_PC, panels,
            pivot_PC, shift_P, weight_bits=scheme.weight_bits,
        )  # fmt: skip
        parts.append(jax.device_get((solved, scale_PGR, zero_PGR)))

    solutions = []
    for p, (weight_RC, hessian, name) in enumerate(zip(checked, hessians, names, strict=True)):
        if not solvable_P[p]:
            solutions.append(solve(weight_RC, hessian, scheme, scale_dtype=scale_dtype, name=name))
            continue
        slices = [SolvedSlice(*(array[p] for array in solved)) for solved, _, _ in parts]
        weight = GroupedWeight(
            transposed([np.asarray(part.codes_CR) for part in slices]),
            np.concatenate([scale_PGR[p].T for _, scale_PGR, _ in parts]),
            np.concatenate([zero_PGR[p].T for _, _, zero_PGR in parts]).astype(np.uint8),
            group_C,
        )
        solutions.append(
            Solution(
                weight,
                gptq_account(
                    weight_RC,
                    slices,
                    scheme.hessian_damping,
                    hessian.gram_CC.diagonal() == 0,
                    hessian.num_rows,
                    scheme,
                ),
            )
        )
    return solutions
