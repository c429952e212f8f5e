"""Sums have NumPy's bits wherever they are added, and a merge on a device takes no memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.plan import InputGroup
from pipeline.recipe.recipe import StatisticsKind
from pipeline.run.worker_api import InputSum
from pipeline.worker import statistics
from pipeline.worker.captured_inputs import Captured
from pipeline.worker.statistics import (
    finished,
    in_numpy,
    judged_drift,
    made,
    merged,
    sum_inputs,
)
from quantizer import HessianSum

SIZE = 516
"""Enough for a Gram in bands, whose widths differ."""


def summed(kind: StatisticsKind, seed: int) -> InputSum:
    group = InputGroup(targets=("dense",), in_features=SIZE, statistics=kind)
    rows = np.random.default_rng(seed).standard_normal((2, 8, SIZE)).astype(np.float32)
    mask = np.arange(8)[None] < np.array([[8], [5]])
    return sum_inputs([Captured(jnp.asarray(rows), mask)], group, (-1,))


def fields(total: InputSum) -> dict[str, Any]:
    found = finished(total)
    return {name: getattr(found, name) for name in found.__slots__}


@pytest.mark.parametrize("kind", ["hessian", "magnitudes"])
def test_sums_merged_on_a_device_have_the_bits_of_those_merged_in_numpy(
    kind: StatisticsKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, right = summed(kind, 0), summed(kind, 1)
    assert len(left.arrays) == {"hessian": 4, "magnitudes": 3}[kind]
    whole = finished(left).merge(finished(right))  # type: ignore[arg-type]
    monkeypatch.setattr(statistics, "_kept", lambda arrays: arrays)
    on_device = [summed(kind, seed) for seed in (0, 1)]
    in_memory = [one.arrays for one in on_device]
    both = merged(*on_device)
    # As one that another worker has sent.
    again = merged(summed(kind, 0), in_numpy(right))
    for found in (merged(left, right), both, again):
        for name, value in fields(found).items():
            np.testing.assert_array_equal(value, getattr(whole, name))
    assert both.num_rows == 2 * 13
    assert all(isinstance(array, jax.Array) for array in both.arrays)
    assert all(array.is_deleted() for array in in_memory[0])
    assert not any(array.is_deleted() for array in in_memory[1])


def test_a_gram_in_bands_is_what_travels() -> None:
    total = in_numpy(summed("hessian", 0))
    assert all(isinstance(array, np.ndarray) for array in total.arrays)
    assert sum(array.nbytes for array in total.arrays) < 0.63 * 4 * SIZE**2


def drifted(seeds: Sequence[int]) -> tuple[list[Captured], Any, Any]:
    """Micro-batches, the odd ones held back; and of each, float64 rows x and x̃."""
    captured, exact, seen = [], [], []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        inputs = rng.standard_normal((2, 8, 4, 6)).astype(np.float32)
        in_float = inputs + rng.standard_normal(inputs.shape).astype(np.float32) / 4
        mask = np.arange(8)[None] < np.array([[8], [5]])
        inputs[~mask] = np.inf
        captured.append(Captured(jnp.asarray(inputs), mask, jnp.asarray(in_float), seed % 2 == 1))
        seen.append(inputs[mask].reshape(-1, 24).astype(np.float64))
        exact.append(in_float[mask].reshape(-1, 24).astype(np.float64))
    return captured, exact, seen


@pytest.mark.parametrize("on_device", [False, True])
def test_drifts_are_summed_apart_from_those_that_are_held_back(
    on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if on_device:
        monkeypatch.setattr(statistics, "_kept", lambda arrays: arrays)
    captured, exact, seen = drifted(range(4))
    group = InputGroup(targets=("dense",), in_features=24, statistics="hessian")
    # One leaf with none that is held back, one with nothing else, and both.
    leaves = [captured[:1], captured[1:2], captured[2:]]
    first, second, third = (sum_inputs(leaf, group, (-2, -1)) for leaf in leaves)
    assert first.held_back is None
    assert second.num_rows == 0
    total = merged(merged(first, in_numpy(second)), third)
    found = judged_drift(total)
    assert found is not None
    both = {held: [np.concatenate(rows[held::2]) for rows in (exact, seen)] for held in (0, 1)}
    for hessian, drift, (x, x_tilde) in (
        (found.hessian, found.drift, both[0]),
        (found.held_back.hessian, found.held_back.drift, both[1]),
    ):
        assert hessian.num_rows == drift.num_rows == len(x) == 2 * 13
        np.testing.assert_allclose(hessian.gram_CC, x_tilde.T @ x_tilde, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(drift.cross_CC, (x - x_tilde).T @ x_tilde, rtol=1e-4, atol=1e-4)
    off = both[1][0] - both[1][1]
    np.testing.assert_allclose(found.held_back.spread_CC, off.T @ off, rtol=1e-4, atol=1e-4)
    whole = finished(total)
    assert isinstance(whole, HessianSum)
    assert whole.num_rows == 4 * 13
    rows = np.concatenate(seen)
    np.testing.assert_allclose(whole.gram_CC, rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_without_drift_nothing_is_judged() -> None:
    assert judged_drift(summed("hessian", 0)) is None


def test_a_sum_is_made_once_all_that_is_summed_beside_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    captured, *_ = drifted(range(2))
    group = InputGroup(targets=("dense",), in_features=24, statistics="hessian")
    total = sum_inputs(captured, group, (-2, -1))
    held_back = total.held_back
    assert held_back is not None
    awaited: list[int] = []

    def wait_for(arrays: list[Any]) -> list[Any]:
        awaited.extend(map(id, arrays))
        return arrays

    monkeypatch.setattr(jax, "block_until_ready", wait_for)
    made(total)
    arrays = (*total.arrays, *total.drift, *held_back.arrays, *held_back.drift)
    assert sorted(awaited) == sorted(map(id, arrays))
    assert len(arrays) == 5
