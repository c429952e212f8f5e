"""What is compiled ahead is what solving runs."""

from __future__ import annotations

import re
from dataclasses import replace

import jax
import numpy as np
import pytest

from quantizer import GPTQScheme, HessianSum, solve
from quantizer import qparams as grid
from quantizer.gptq import block_kernel, factor, gpu_loop, refine, refit
from quantizer.gptq import column_loop as gptq
from quantizer.gptq import column_loop as panels
from quantizer.gptq import factor as cholesky
from quantizer.gptq import solve as solver
from quantizer.gptq.path import GPU
from quantizer.gptq.solve import compile_solver

# They clear what JAX has compiled, which other tests would have to compile again.
pytestmark = pytest.mark.exhaustive

# `quantizer.jit` leaves what it wraps at hand.
PROGRAMS = {
    value.__name__
    for module in (cholesky, factor, gptq, gpu_loop, grid, panels, refine, refit)
    for value in vars(module).values()
    if hasattr(value, "__wrapped__")
}


def compiled_by_solve(
    out_features: int, in_features: int, scheme: GPTQScheme, log: pytest.LogCaptureFixture
) -> set[str]:
    """The programs that a solve compiles, beside JAX's own for single operations."""
    rng = np.random.default_rng(0)
    weight_RC = rng.standard_normal((out_features, in_features), dtype=np.float32)
    hessian = HessianSum.of(rng.standard_normal((2 * in_features, in_features), dtype=np.float32))
    log.clear()
    # Not the context of that name, which is one thread's: slices are solved in others.
    jax.config.update("jax_log_compiles", True)
    try:
        solve(weight_RC, hessian, scheme, scale_dtype="bfloat16")
    finally:
        jax.config.update("jax_log_compiles", False)
    compiling = (re.match(r"Compiling jit\((\w+)\)", record.getMessage()) for record in log.records)
    return {match[1] for match in compiling if match} & PROGRAMS


@pytest.mark.parametrize(
    ("in_features", "activation_order", "refinement_sweeps"),
    [(72, False, 0), pytest.param(800, True, 1, marks=pytest.mark.exhaustive)],
)
def test_a_solve_compiles_nothing_that_was_compiled_ahead(
    in_features: int,
    activation_order: bool,
    refinement_sweeps: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    scheme = GPTQScheme(
        weight_bits=3,
        group_size=24,
        activation_order=activation_order,
        refinement_sweeps=refinement_sweeps,
        scale_refit=refinement_sweeps > 0,
        scale_search=True,
    )
    jax.clear_caches()
    compile_solver(544, in_features, scheme, scale_dtype="bfloat16")
    assert compiled_by_solve(544, in_features, scheme, caplog) == set()
    # Of another shape, others are: the check can fail.
    refining = (
        {"damped_hessian", "_refit_unit", "_sweep_panel", "_settled"}
        if refinement_sweeps
        else set()
    )
    solving = {"arrange", "find_grid", "columns_of", "_solve_panel", "better"}
    assert compiled_by_solve(200, 136, scheme, caplog) >= solving | refining


def test_a_solve_on_gpus_compiles_nothing_that_was_compiled_ahead(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_kernel, "TILE", 2)
    monkeypatch.setattr(block_kernel, "STEP", 2)
    monkeypatch.setattr(solver, "this_path", lambda: replace(GPU, band=64))
    scheme = GPTQScheme(group_size=16, activation_order=True, refinement_sweeps=1, scale_refit=True)
    jax.clear_caches()
    compile_solver(100, 80, scheme, scale_dtype="bfloat16")
    assert compiled_by_solve(100, 80, scheme, caplog) == set()
    # Kernels are compiled once for panels of a size, whatever the layer's.
    assert not compiled_by_solve(24, 80, scheme, caplog)
    factoring = {"arrange", "factorize_whole", "damped_whole"}
    assert compiled_by_solve(24, 64, scheme, caplog) >= {"find_grid", "_solve_panel"} | factoring


def test_one_program_solves_the_panels_of_all_bits_and_widths(
    caplog: pytest.LogCaptureFixture,
) -> None:
    schemes = [GPTQScheme(weight_bits=bits, group_size=-1, refinement_sweeps=1) for bits in (2, 4)]
    panel = {"_solve_panel", "_sweep_panel"}
    # Other tests may have solved such panels in this process.
    jax.clear_caches()
    assert compiled_by_solve(40, 1024, schemes[0], caplog) >= panel
    assert not compiled_by_solve(40, 1024, schemes[1], caplog) & panel
    assert not compiled_by_solve(40, 1536, schemes[0], caplog) & panel
