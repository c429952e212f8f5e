"""Where the solver's time goes: its own phases, one after the other."""

from __future__ import annotations

import statistics
import time

import numpy as np

from quantizer import GPTQScheme, HessianSum, row_slices
from quantizer.gptq.solve import grid_of, share_input, solve_on_grid
from quantizer.solver import check_layer


def phase_seconds(
    weight_RC: np.ndarray, hessian: HessianSum, scheme: GPTQScheme, repeats: int
) -> dict[str, float]:
    """Median seconds of each phase, once `quantizer.solve` has compiled them."""
    rounds = [_one_round(weight_RC, hessian, scheme) for _ in range(repeats)]
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


def _one_round(weight_RC: np.ndarray, hessian: HessianSum, scheme: GPTQScheme) -> dict[str, float]:
    seconds = dict.fromkeys(("checks", "factor", "grid", "loop"), 0.0)
    last = time.perf_counter()

    def lap(phase: str) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[phase] += now - last
        last = now

    check_layer(weight_RC, scheme)
    hessian.check(weight_RC.shape[1], "layer")
    lap("checks")
    shared = share_input(hessian, scheme)  # reads the pivots, so it has finished
    lap("factor")
    for a, b in row_slices(*weight_RC.shape):
        grid = grid_of(weight_RC[a:b], shared.energy_C[None], scheme, "float32")
        lap("grid")
        solve_on_grid(weight_RC[a:b], shared, grid)
        lap("loop")
    return seconds
