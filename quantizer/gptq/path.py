"""The steps of GPTQ as a CPU and as a GPU do them best.

A CPU's caches decide its way: small panels, slices that stay in cache, leaves on one thread. On a
GPU, starting work does: one factorization, whole products, one kernel for a block of columns. Both
compute the same; their codes differ where float32's rounding decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jax import Array

from quantizer.gptq.column_loop import Columns, SolvedSlice, solve_slice
from quantizer.gptq.factor import Blocks, Factor, factorize_shifted, factorize_whole
from quantizer.gptq.gpu_loop import damped_whole, solve_whole, sweep_whole
from quantizer.gptq.refine import Sweep, damped_hessian, refine_slice, sweep_panels
from quantizer.gptq.refit import Refit
from quantizer.schemes import GPTQScheme

BAND = 2048
"""Output channels that a GPU solves in one loop, fewer being padded to as many.

A loop over so many takes hardly longer than one over fewer: GPTQ and rounding together, a thread
each, are 128 warps, about one for each of an H100's 132 processors, and products with 2 · 2,048
columns fill them too. Twice as many would save launches, but workers share a layer by its bands,
and the 4,096 rows of an 8B model's o and down projections would be one worker's.

What workers do not share is the factor: each that solves a band factors the Hessian for itself, at
C³/3 flops. Of 8B's down projection (C = 14,336) that is 1.0 Tflop beside 2.7 for a band with two
sweeps; at a GPU's float32 rate of about 50 Tflop/s two workers take 75 ms instead of one's 130.
"""


@dataclass(frozen=True, slots=True)
class Path:
    """One way of solving.

    Attributes:
        factorize: the Hessian for one damping, by blocks; a failure shows as NaN pivots.
        damp: the damped Hessian, cut as `sweep` needs it.
        solve: a slice of output channels by GPTQ.
        sweep: a slice's columns in refinement.
        band: output channels of each loop; None if any number is as good.
    """

    factorize: Callable[[Array, Array], tuple[Blocks, Array]]
    damp: Callable[[Array, Array, Array], Blocks]
    solve: Callable[..., SolvedSlice]
    sweep: Sweep
    band: int | None

    def solve_columns(
        self,
        columns: Columns,
        factor: Factor,
        damped: Blocks,
        scheme: GPTQScheme,
        refit: Refit | None,
    ) -> tuple[SolvedSlice, Array]:
        """Solve a slice, and refine it if the scheme says so.

        Returns:
            The slice, and its scales, [groups, slice].
        """
        bits, sweeps = scheme.weight_bits, scheme.refinement_sweeps
        solved = self.solve(columns, factor, weight_bits=bits)
        if not sweeps:
            return solved, columns.scale_GR
        return refine_slice(
            solved,
            columns,
            factor,
            damped,
            weight_bits=bits,
            sweeps=sweeps,
            sweep=self.sweep,
            refit=refit,
        )


CPU = Path(factorize_shifted, damped_hessian, solve_slice, sweep_panels, None)
GPU = Path(factorize_whole, damped_whole, solve_whole, sweep_whole, BAND)


def path_of(backend: str) -> Path:
    """The way that suits a backend, as JAX names it."""
    return CPU if backend == "cpu" else GPU
