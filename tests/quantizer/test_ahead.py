"""What is compiled ahead is what solving runs."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from quantizer import GPTQScheme, HessianSum, solve
from quantizer.ahead import compile_solver

PROGRAMS = (
    "arrange",
    "damped_hessian",
    "factorize_shifted",
    "find_grid",
    "refine_slice",
    "solve_slice",
)


def compiled_by_solve(
    out_features: int, in_features: int, scheme: GPTQScheme, log: pytest.LogCaptureFixture
) -> set[str]:
    """Which of the solver's programs a solve compiles."""
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
    told = [record.getMessage() for record in log.records]
    return {
        name
        for name in PROGRAMS
        if any(line.startswith("Compiling") and f"({name})" in line for line in told)
    }


@pytest.mark.parametrize("activation_order", [True, False])
@pytest.mark.parametrize("refinement_sweeps", [0, 1])
def test_a_solve_compiles_nothing_that_was_compiled_ahead(
    activation_order: bool, refinement_sweeps: int, caplog: pytest.LogCaptureFixture
) -> None:
    scheme = GPTQScheme(
        weight_bits=3,
        group_size=24,
        activation_order=activation_order,
        refinement_sweeps=refinement_sweeps,
        scale_search=True,
    )
    jax.clear_caches()
    compile_solver(544, 72, scheme, scale_dtype="bfloat16")
    assert compiled_by_solve(544, 72, scheme, caplog) == set()
    # Of another shape, all are: the check can fail.
    refining = {"damped_hessian", "refine_slice"} if refinement_sweeps else set()
    others = set(PROGRAMS) - {"damped_hessian", "refine_slice"}
    assert compiled_by_solve(200, 136, scheme, caplog) == others | refining
