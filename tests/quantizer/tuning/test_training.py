"""Training is Adam on the straight-through gradient of a block's error, in float64 by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from numpy.typing import NDArray

from quantizer.qparams import contiguous_groups
from quantizer.tuning.rounding import MOST_OFFSET, Grid, Steps, start, weights
from quantizer.tuning.training import (
    Batch,
    BlockTraining,
    KernelForm,
    Rates,
    Start,
    Trained,
    VectorForm,
)

C, R, BITS, SIZE = 10, 6, 2, 4
NUM_GROUPS = -(-C // SIZE)
KERNEL = KernelForm(
    place=0, shape=(C, R), dtype="float32", weight_bits=BITS, group_size=SIZE, scale_dtype="float32"
)
NORM = VectorForm(place=1, dtype="float32", stored_dtype="float32")


def forward(values: Sequence[Array], taken: Sequence[Array]) -> list[Array]:
    """A norm's weight, a product and something that is not linear."""
    kernel, norm, bias = values
    return [jnp.tanh(taken[0] * norm @ kernel) + bias]


@pytest.fixture
def problem() -> dict[str, Any]:
    rng = np.random.default_rng(3)
    weight_RC = rng.normal(size=(R, C)).astype(np.float32)
    scale_RG = rng.uniform(0.5, 1, (R, NUM_GROUPS)).astype(np.float32)
    zero_RG = rng.integers(0, 4, (R, NUM_GROUPS)).astype(np.float32)
    group_C = contiguous_groups(C, SIZE)
    codes = np.clip(np.round(weight_RC / scale_RG[:, group_C] + zero_RG[:, group_C]), 0, 3)
    codes[0, :3] = (codes[0, :3] + 1) % 4  # a solver's code need not be the nearest
    grid = Grid(codes.astype(np.uint8), scale_RG, zero_RG)
    norm = rng.uniform(0.5, 2, C).astype(np.float32)
    bias = rng.normal(size=R).astype(np.float32)
    batches = []
    for _ in range(2):
        mask = np.ones((2, 5), bool)
        mask[1, 3:] = False
        taken = rng.normal(size=(2, 5, C)).astype(np.float32)
        target = rng.normal(size=(2, 5, R)).astype(np.float32)
        taken[1, 3:], target[1, 3:] = 100, np.nan
        batches.append(Batch((taken,), (target,), (mask,)))
    return {
        "start": Start((grid,), (norm,)),
        "first": Trained((start(grid),), (np.zeros(C, np.float32),)),
        "values": [np.zeros((C, R), np.float32), np.ones(C, np.float32), bias],
        "batches": batches,
    }


def training() -> BlockTraining:
    return BlockTraining(forward, [KERNEL], [NORM])


def loss(kernel: NDArray[np.float64], norm: NDArray[np.float64], bias: Any, batch: Batch) -> float:
    """Σ‖y − t‖² / ‖t‖² over the tokens that are no padding, in float64."""
    [mask] = batch.masks
    x, t = batch.taken[0][mask].astype(np.float64), batch.targets[0][mask].astype(np.float64)
    y = np.tanh(x * norm @ kernel) + bias
    size = np.sum(t**2, axis=1)
    size = np.maximum(size, 1e-3 * size.mean())
    return float(np.sum(np.sum((y - t) ** 2, axis=1) / size))


def decoded(grid: Grid, steps: Steps) -> NDArray[np.float64]:
    """The kernel [C, R] by the definition of the grid, with Python's own rounding."""
    kernel = np.zeros((C, R))
    for r in range(R):
        for c in range(C):
            g = c // SIZE
            place = float(grid.code_RC[r, c]) + float(steps.offset_RC[r, c])
            code = round(min(max(place, 0), 2**BITS - 1))
            scale = float(grid.scale_RG[r, g]) * np.exp(float(steps.log_scale_RG[r, g]))
            kernel[c, r] = (code - float(grid.zero_RG[r, g])) * scale
    return kernel


def slope(function: Callable[[float], float], step: float = 1e-6) -> float:
    return (function(step) - function(-step)) / (2 * step)


def expected_gradient(problem: dict[str, Any], trained: Trained) -> Trained:
    """By finite differences; of a code, as if rounding were not there."""
    [grid], [norm] = problem["start"]
    [steps], [moved] = trained
    bias = problem["values"][2].astype(np.float64)
    unit = np.maximum(np.abs(norm), np.median(np.abs(norm))).astype(np.float64)
    kernel = decoded(grid, steps)
    at_norm = norm + unit * np.asarray(moved, np.float64)

    def error(kernel: NDArray[np.float64], norm: NDArray[np.float64]) -> float:
        return sum(loss(kernel, norm, bias, batch) for batch in problem["batches"])

    offset = np.zeros((R, C))
    log_scale = np.zeros((R, NUM_GROUPS))
    for r in range(R):
        for c in range(C):
            g = c // SIZE
            scale = float(grid.scale_RG[r, g]) * np.exp(float(steps.log_scale_RG[r, g]))

            def moved_code(by: float, r: int = r, c: int = c, scale: float = scale) -> float:
                changed = kernel.copy()
                changed[c, r] += by * scale
                return error(changed, at_norm)

            offset[r, c] = slope(moved_code)
        for g in range(NUM_GROUPS):

            def moved_scale(by: float, r: int = r, g: int = g) -> float:
                changed = kernel.copy()
                changed[g * SIZE : (g + 1) * SIZE, r] *= np.exp(by)
                return error(changed, at_norm)

            log_scale[r, g] = slope(moved_scale)
    of_norm = np.zeros(C)
    for c in range(C):

        def moved_norm(by: float, c: int = c) -> float:
            changed = at_norm.copy()
            changed[c] += by * unit[c]
            return error(kernel, changed)

        of_norm[c] = slope(moved_norm)
    return Trained((Steps(offset, log_scale),), (of_norm,))


def test_before_the_first_step_the_weights_are_the_solver_s(problem: dict[str, Any]) -> None:
    [grid], _ = problem["start"]
    [steps], _ = problem["first"]
    found_RC = np.asarray(weights(grid, steps, BITS, SIZE, "float32"))
    group_C = contiguous_groups(C, SIZE)
    solved_RC = (grid.code_RC - grid.zero_RG[:, group_C]) * grid.scale_RG[:, group_C]
    np.testing.assert_array_equal(found_RC, solved_RC.astype(np.float32))


def test_steps_are_adam_s_on_the_straight_through_gradient(problem: dict[str, Any]) -> None:
    rates, num_steps = Rates(offset=0.3, scale=0.02, norm=0.05), 3
    found = training().train(
        problem["first"],
        problem["start"],
        problem["values"],
        [problem["batches"]] * num_steps,
        rates,
    )
    trained = jax.tree.map(lambda x: np.asarray(x, np.float64), problem["first"])
    by_leaf = Trained((Steps(rates.offset, rates.scale),), (rates.norm,))
    mean = square = jax.tree.map(np.zeros_like, trained)
    for number in range(num_steps):
        gradient = expected_gradient(problem, trained)
        mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, gradient)
        square = jax.tree.map(lambda s, g: 0.999 * s + 0.001 * g**2, square, gradient)
        left = 1 - number / num_steps

        def step(
            x: Any, m: Any, s: Any, rate: float, n: int = number + 1, left: float = left
        ) -> Any:
            m, s = m / (1 - 0.9**n), s / (1 - 0.999**n)
            return x - left * rate * m / (np.sqrt(s) + 1e-15)

        trained = jax.tree.map(step, trained, mean, square, by_leaf)
        steps = trained.kernels[0]
        code_RC = problem["start"].grids[0].code_RC
        least_RC = np.maximum(-MOST_OFFSET, -0.499 - code_RC)
        most_RC = np.minimum(MOST_OFFSET, 2**BITS - 1 + 0.499 - code_RC)
        bounded = Steps(np.clip(steps.offset_RC, least_RC, most_RC), steps.log_scale_RG)
        trained = Trained((bounded,), trained.vectors)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), found, trained)


def test_an_error_is_of_the_weights_that_are_stored(problem: dict[str, Any]) -> None:
    trainer = training()
    trained = trainer.train(
        problem["first"],
        problem["start"],
        problem["values"],
        [problem["batches"]] * 20,
        Rates(offset=0.1, scale=0.02, norm=0.02),
    )
    [(codes, scale_RG)], [norm] = trainer.results(trained, problem["start"])
    [grid] = problem["start"].grids
    assert codes.dtype == np.uint8
    assert codes.max() < 2**BITS
    assert np.any(codes != grid.code_RC)
    moved = np.abs(codes.astype(int) - grid.code_RC.astype(int))
    assert moved.max() == 1
    group_C = contiguous_groups(C, SIZE)
    kernel = ((codes - grid.zero_RG[:, group_C]) * scale_RG[:, group_C]).T.astype(np.float64)
    bias = problem["values"][2]
    count = sum(int(batch.masks[0].sum()) for batch in problem["batches"])
    stored = sum(loss(kernel, norm, bias, batch) for batch in problem["batches"]) / count
    found = trainer.error(trained, problem["start"], problem["values"], problem["batches"])
    assert found == pytest.approx(stored, rel=1e-5)
    first = trainer.error(problem["first"], problem["start"], problem["values"], problem["batches"])
    assert found < 0.9 * first


def test_scales_and_norms_are_trained_as_they_are_stored() -> None:
    """A change that bfloat16 does not hold changes nothing, and still adds up."""
    rng = np.random.default_rng(0)
    scale_RG = rng.uniform(0.5, 1, (R, 1)).astype(jnp.bfloat16).astype(np.float32)
    grid = Grid(rng.integers(0, 4, (R, C)).astype(np.uint8), scale_RG, np.ones((R, 1), np.float32))
    form = KernelForm(
        place=0, shape=(C, R), dtype="float32", weight_bits=2, group_size=-1, scale_dtype="bfloat16"
    )
    norm = rng.uniform(0.5, 1, C).astype(jnp.bfloat16).astype(np.float32)
    trainer = BlockTraining(
        forward, [form], [VectorForm(place=1, dtype="float32", stored_dtype="bfloat16")]
    )
    begin = Start((grid,), (norm,))
    for size, same in ((1e-4, True), (0.05, False)):
        steps = Steps(np.zeros((R, C), np.float32), np.full((R, 1), size, np.float32))
        [(_, scale)], [vector] = trainer.results(
            Trained((steps,), (np.full(C, size, np.float32),)), begin
        )
        for new, old in ((scale, scale_RG), (vector, norm)):
            np.testing.assert_array_equal(new, new.astype(jnp.bfloat16).astype(np.float32))
            assert np.array_equal(new, old) == same
